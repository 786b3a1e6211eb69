//! Prints what a C compiler makes of the names in `../src/ibverbs/abi/names.rs`. See `README.md`.

use std::mem::{MaybeUninit, align_of, offset_of, size_of};

use header::ibv_wc;
use ibverbs_sys::{
    ibv_ah_attr, ibv_async_event, ibv_async_event__bindgen_ty_1 as ibv_async_event_element, ibv_comp_channel,
    ibv_context, ibv_context_ops, ibv_cq, ibv_device, ibv_device_attr, ibv_gid, ibv_gid_entry,
    ibv_global_route, ibv_mr, ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr,
    ibv_recv_wr, ibv_send_wr, ibv_send_wr__bindgen_ty_2 as ibv_send_wr_wr,
    ibv_send_wr__bindgen_ty_2__bindgen_ty_1 as ibv_send_wr_rdma, ibv_sge, ibv_srq, ibv_srq_attr,
    ibv_srq_init_attr,
};

/// The rest: see `build.rs`.
mod header {
    #![allow(non_camel_case_types, non_upper_case_globals, dead_code)]
    include!(concat!(env!("OUT_DIR"), "/verbs.rs"));
}

macro_rules! names {
    (
        structs {$($name:ident {$($field:ident $([$($in_c:tt)*])?)*})*}
        constants {$($constant:ident $([$constant_in_c:ident])?)*}
    ) => {
        fn main() {
            $(
                println!("{} {} {}", stringify!($name), size_of::<$name>(), align_of::<$name>());
                $(field!($name $field [$($($in_c)*)?]);)*
            )*
            $(constant!($constant [$($constant_in_c)?]);)*
        }
    };
}

macro_rules! field {
    ($name:ident $field:ident []) => {
        field!($name $field [$field])
    };
    ($name:ident $field:ident [$($in_c:tt)+]) => {
        let place = MaybeUninit::<$name>::uninit();
        // SAFETY: the address of a field within `place`, of which nothing is read.
        let field = unsafe { &raw const (*place.as_ptr()).$($in_c)+ };
        let (offset, size) = (offset_of!($name, $($in_c)+), size_of_pointee(field));
        println!("  {}.{} {offset} {size}", stringify!($name), stringify!($field));
    };
}

macro_rules! constant {
    ($constant:ident []) => {
        constant!($constant[$constant])
    };
    ($constant:ident [$in_c:ident]) => {
        println!("{} = {}", stringify!($constant), i64::from(header::$in_c))
    };
}

include!("../../src/ibverbs/abi/names.rs");

fn size_of_pointee<T>(_: *const T) -> usize {
    size_of::<T>()
}
