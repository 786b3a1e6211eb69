//! The functions of libibverbs, found when they are needed.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;
use std::ops::Deref;

use libc::ssize_t;
use libloading::os::unix;
use thiserror::Error;

use super::sys::{
    ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_gid,
    ibv_gid_entry, ibv_mr, ibv_pd, ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_srq,
    ibv_srq_init_attr,
};

/// The name that every libibverbs of rdma-core has, and of the OFED before it.
const FILE: &str = "libibverbs.so.1";

/// libibverbs: [`Functions`] that keep what the manual pages promise.
#[derive(Clone, Copy)]
pub struct Library {
    functions: Functions,
}

/// Why libibverbs cannot be used on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LoadError {
    /// The library is not installed, or it does not load: the linker's words.
    #[error("libibverbs.so.1 cannot be loaded: {reason}")]
    NotFound {
        /// What the dynamic linker says.
        reason: String,
    },
    /// The library is too old.
    #[error("libibverbs.so.1 has no {name}: rdma-core is needed, of any version")]
    Symbol {
        /// The function that it lacks.
        name: &'static str,
    },
}

/// Loads the libibverbs of this machine. It stays loaded until the process ends.
pub fn load() -> Result<Library, LoadError> {
    // SAFETY: the code that runs when libibverbs and what it links is loaded asks nothing of its caller.
    let opened = unsafe { unix::Library::open(Some(FILE), unix::RTLD_NOW | unix::RTLD_LOCAL) };
    let opened = opened.map_err(|error| LoadError::NotFound { reason: error.to_string() })?;
    // Never closed: the functions below are copied out of it, and drivers that it loads by itself may have left
    // threads and handlers behind.
    let opened = ManuallyDrop::new(opened);
    // SAFETY: the types in `Functions` are those of `infiniband/verbs.h`, which every libibverbs.so.1 keeps.
    let functions = unsafe { Functions::find(&opened)? };
    Ok(Library { functions })
}

impl Library {
    /// A library of other making.
    ///
    /// # Safety
    ///
    /// Each function does what the manual page of its name says, for callers that keep to it, from any thread. What
    /// it makes is laid out as in [`sys`](super::sys), and lives until it is destroyed.
    pub unsafe fn from_table(functions: Functions) -> Self {
        Self { functions }
    }
}

impl Deref for Library {
    type Target = Functions;

    fn deref(&self) -> &Functions {
        &self.functions
    }
}

/// Declares [`Functions`] and how they are found: each under its own name.
///
/// `dlsym` without a version answers with the default one, as the linker would: of the symbols that exist twice,
/// that is the newer, `IBVERBS_1.1`. The older are of an ABI with other structs.
macro_rules! functions {
    (
        $(#[$table:meta])*
        required {$(
            $(#[$required_doc:meta])*
            $required:ident($($required_arg:ident: $required_type:ty),*) $(-> $required_back:ty)?;
        )*}
        optional {$(
            $(#[$optional_doc:meta])*
            $optional:ident($($optional_arg:ident: $optional_type:ty),*) $(-> $optional_back:ty)?;
        )*}
    ) => {
        $(#[$table])*
        #[derive(Clone, Copy)]
        pub struct Functions {
            $(
                $(#[$required_doc])*
                pub $required: unsafe extern "C" fn($($required_arg: $required_type),*) $(-> $required_back)?,
            )*
            $(
                $(#[$optional_doc])*
                pub $optional: Option<unsafe extern "C" fn($($optional_arg: $optional_type),*) $(-> $optional_back)?>,
            )*
        }

        impl Functions {
            /// # Safety
            ///
            /// What `object` exports under the names of this table has the types of this table.
            unsafe fn find(object: &unix::Library) -> Result<Self, LoadError> {
                Ok(Self {
                    $($required: {
                        let name = stringify!($required);
                        // SAFETY: its type is as the caller promises, and `find` is asked for functions alone.
                        unsafe { find(object, name) }.ok_or(LoadError::Symbol { name })?
                    },)*
                    // SAFETY: the same.
                    $($optional: unsafe { find(object, stringify!($optional)) },)*
                })
            }
        }
    };
}

functions! {
    /// The functions of libibverbs that a port uses, under their own names. Its manual pages say what they do and ask.
    ///
    /// Three kinds of answers: a pointer is null on failure, with the code in `errno`; an integer is 0 or the code;
    /// where an integer may be -1, that is said.
    required {
        ibv_get_device_list(num_devices: *mut c_int) -> *mut *mut ibv_device;
        ibv_free_device_list(list: *mut *mut ibv_device);
        ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
        /// In network byte order.
        ibv_get_device_guid(device: *mut ibv_device) -> u64;
        ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
        ibv_close_device(context: *mut ibv_context) -> c_int;
        ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int;
        /// Fills `attr` up to `port_cap_flags2`. Old libraries leave more of its end: hand in zeros.
        ibv_query_port(context: *mut ibv_context, port_num: u8, attr: *mut ibv_port_attr) -> c_int;
        /// -1 on failure.
        ibv_query_gid(context: *mut ibv_context, port_num: u8, index: c_int, gid: *mut ibv_gid) -> c_int;
        /// -1 on failure. The key comes in network byte order.
        ibv_query_pkey(context: *mut ibv_context, port_num: u8, index: c_int, pkey: *mut u16) -> c_int;

        ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
        ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
        /// Knows no flags of `IBV_ACCESS_OPTIONAL_RANGE`.
        ibv_reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr;
        ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;

        ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
        ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
        ibv_create_cq(
            context: *mut ibv_context,
            cqe: c_int,
            cq_context: *mut c_void,
            channel: *mut ibv_comp_channel,
            comp_vector: c_int
        ) -> *mut ibv_cq;
        ibv_resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int;
        ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
        /// -1 on failure, with the code in `errno`.
        ibv_get_cq_event(
            channel: *mut ibv_comp_channel,
            cq: *mut *mut ibv_cq,
            cq_context: *mut *mut c_void
        ) -> c_int;
        ibv_ack_cq_events(cq: *mut ibv_cq, nevents: c_uint);

        ibv_create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
        ibv_destroy_srq(srq: *mut ibv_srq) -> c_int;

        ibv_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
        ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int) -> c_int;
        ibv_query_qp(
            qp: *mut ibv_qp,
            attr: *mut ibv_qp_attr,
            attr_mask: c_int,
            init_attr: *mut ibv_qp_init_attr
        ) -> c_int;
        ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;

        /// -1 on failure, with the code in `errno`.
        ibv_get_async_event(context: *mut ibv_context, event: *mut ibv_async_event) -> c_int;
        ibv_ack_async_event(event: *mut ibv_async_event);
    }

    optional {
        /// Since `IBVERBS_1.8` (rdma-core 28). Optional access flags that the kernel lacks are left out.
        ibv_reg_mr_iova2(
            pd: *mut ibv_pd,
            addr: *mut c_void,
            length: usize,
            iova: u64,
            access: c_uint
        ) -> *mut ibv_mr;
        /// Since `IBVERBS_1.11` (rdma-core 32). The number of entries, or the code of an error below zero;
        /// `entry_size` is that of [`ibv_gid_entry`].
        _ibv_query_gid_table(
            context: *mut ibv_context,
            entries: *mut ibv_gid_entry,
            max_entries: usize,
            flags: u32,
            entry_size: usize
        ) -> ssize_t;
        /// Since `IBVERBS_1.12` (rdma-core 34).
        ibv_reg_dmabuf_mr(
            pd: *mut ibv_pd,
            offset: u64,
            length: usize,
            iova: u64,
            fd: c_int,
            access: c_int
        ) -> *mut ibv_mr;
    }
}

/// # Safety
///
/// `T` is a function pointer of the type of `object`'s symbol `name`.
unsafe fn find<T: Copy>(object: &unix::Library, name: &str) -> Option<T> {
    // SAFETY: the caller's promise; a symbol may also be null, which is how `None` of a function pointer is laid out.
    unsafe { object.get::<Option<T>>(name) }.ok().and_then(|symbol| *symbol)
}
