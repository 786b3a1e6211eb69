//! What ibverbs-sys does not say, from the header that it comes with: constants, each under its plain name, and
//! `ibv_wc`, whose fields it keeps to itself.

use std::env;
use std::path::Path;

fn main() {
    let include = env::var("DEP_IBVERBS_INCLUDE").expect("ibverbs-sys says where its headers are built");
    let rdma_core = Path::new(&include).ancestors().nth(2).expect("it is rdma-core/build/include");
    let bindings = bindgen::Builder::default()
        .header(rdma_core.join("libibverbs/verbs.h").to_str().expect("a path in UTF-8"))
        .allowlist_type(
            "ibv_wc|ibv_mtu|ibv_(node|transport|gid|event|qp)_type|ibv_(port|qp)_state|ibv_qp_attr_mask",
        )
        .allowlist_type("ibv_(wc|wr)_opcode|ibv_wc_status|ibv_(access|wc|send)_flags")
        .allowlist_type("ib_uverbs_(access|query_port)_flags")
        .allowlist_var("IBV_LINK_LAYER_.*")
        .prepend_enum_name(false)
        .generate()
        .expect("libclang reads verbs.h");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("verbs.rs");
    bindings.write_to_file(out).expect("it can be written");
}
