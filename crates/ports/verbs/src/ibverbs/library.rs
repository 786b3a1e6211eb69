//! The functions of libibverbs, found when they are needed.

use std::error::Error as _;
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
    // SAFETY: the name is libibverbs' own, and what runs when it is loaded asks nothing of its caller. All that have
    // this name keep the ABI of `infiniband/verbs.h`.
    unsafe { load_from(FILE) }
}

/// # Safety
///
/// If there is a library `file`, it can be loaded at any time, and it is libibverbs or has none of its functions.
unsafe fn load_from(file: &str) -> Result<Library, LoadError> {
    // SAFETY: the caller's promise.
    let opened = unsafe { unix::Library::open(Some(file), unix::RTLD_NOW | unix::RTLD_LOCAL) };
    // What the linker said is the source of libloading's error.
    let opened = opened.map_err(|error| LoadError::NotFound {
        reason: error.source().map_or_else(|| error.to_string(), ToString::to_string),
    })?;
    // Never closed: the functions below are copied out of it, and drivers that it loads by itself may leave threads
    // and handlers behind.
    let opened = ManuallyDrop::new(opened);
    // SAFETY: the types in `Functions` are those of `infiniband/verbs.h`.
    let functions = unsafe { Functions::find(&opened)? };
    Ok(Library { functions })
}

#[cfg(feature = "fake")]
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

            /// Each function that there is, with its name.
            #[cfg(test)]
            fn addresses(&self) -> Vec<(&'static str, *const c_void)> {
                let required = [$((stringify!($required), self.$required as *const c_void)),*];
                let optional = [$((stringify!($optional), self.$optional.map(|f| f as *const c_void))),*];
                let present = optional.into_iter().filter_map(|(name, address)| Some((name, address?)));
                required.into_iter().chain(present).collect()
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

#[cfg(test)]
mod tests {
    use std::ffi::{CStr, CString};
    use std::ptr;

    use super::*;

    /// The libibverbs of this machine, if it has one.
    fn library() -> Option<Library> {
        match load() {
            Ok(library) => Some(library),
            Err(error @ LoadError::NotFound { .. }) => {
                eprintln!("SKIPPED: {error}");
                None
            }
            Err(error @ LoadError::Symbol { .. }) => panic!("{error}"),
        }
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_with_a_reason() {
        // SAFETY: there is no such file.
        let missing = unsafe { load_from("libibverbs.so.not-there") };
        let Err(LoadError::NotFound { reason }) = missing else { panic!("found") };
        assert!(reason.contains("libibverbs.so.not-there"), "{reason}");
    }

    #[test]
    #[cfg(target_env = "gnu")]
    fn a_library_that_lacks_a_function_is_an_error_with_its_name() {
        // SAFETY: this process runs on it already, and it has no function of libibverbs.
        let other = unsafe { load_from("libc.so.6") };
        assert_eq!(other.err(), Some(LoadError::Symbol { name: "ibv_get_device_list" }));
    }

    #[test]
    fn the_library_of_this_machine_answers() {
        let Some(library) = library() else { return };
        let mut count = -1;
        // SAFETY: it asks for room for a number.
        let list = unsafe { (library.ibv_get_device_list)(&mut count) };
        if list.is_null() {
            // No kernel support for RDMA: ENOSYS, or the code of what could not be read.
            assert_ne!(std::io::Error::last_os_error().raw_os_error(), Some(0));
            return;
        }
        assert!(count >= 0, "{count} devices");
        // SAFETY: the list is from the call above, has `count` devices and a null, and is freed once.
        unsafe {
            assert!((*list.add(count as usize)).is_null());
            (library.ibv_free_device_list)(list);
        }
    }

    /// The functions of `IBVERBS_1.0` that have a newer version take other structs: none of them may be picked.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn of_two_versions_the_newer_is_found() {
        let Some(library) = library() else { return };
        let file = CString::new(FILE).unwrap();
        // SAFETY: the file is loaded already.
        let object = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW) };
        let mut compared = 0;
        for (name, found) in library.addresses() {
            let symbol = CString::new(name).unwrap();
            let version = |version: &CStr| {
                // SAFETY: a library that is open, and strings that end in zero.
                unsafe { libc::dlvsym(object, symbol.as_ptr(), version.as_ptr()) }.cast_const()
            };
            let (old, new) = (version(c"IBVERBS_1.0"), version(c"IBVERBS_1.1"));
            if new.is_null() {
                // One version alone.
                assert!(old.is_null() || ptr::eq(old, found), "{name}");
                continue;
            }
            assert!(ptr::eq(new, found), "{name}: found {found:?}, IBVERBS_1.1 has {new:?}");
            assert!(!ptr::eq(old, new), "{name}: both versions are one");
            compared += 1;
        }
        assert!(compared > 20, "only {compared} functions have two versions");
    }
}
