//! The driver's functions, as far as they are called here: each is looked up by its name, so that what is missing is an error
//! that names it. Tests fill the table with functions of their own.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use cudarc::driver::sys;

use super::LoadError;
use super::abi::{
    Access, Address, Answer, DeviceNumber, FabricHandle, Handle, IpcHandle, Physical, Properties,
};

macro_rules! table {
    (
        needed { $($name:ident: fn($($needed:ty),* $(,)?);)* }
        newer { $($new:ident: fn($($argument:ty),* $(,)?);)* }
    ) => {
        /// The driver's functions, under their own names.
        #[allow(non_snake_case)]
        #[derive(Clone)]
        pub struct Table {
            $(pub $name: unsafe extern "C" fn($($needed),*) -> Answer,)*
            $(
                /// `None`: the driver is older than it.
                pub $new: Option<unsafe extern "C" fn($($argument),*) -> Answer>,
            )*
        }

        impl Table {
            /// Looks for the library, and in it for every function.
            pub fn load() -> Result<Table, LoadError> {
                // `cudarc` panics where a library is missing: so it is asked for before.
                // SAFETY: the driver's library may be loaded at any time.
                if !unsafe { sys::is_culib_present() } {
                    return Err(LoadError::NoLibrary);
                }
                // SAFETY: it is present.
                let library = unsafe { sys::culib() };
                Ok(Table {
                    $($name: {
                        // SAFETY: the function is declared as `cuda.h` declares the one of this name, with integers in the
                        // place of its enumerations; the library is never unloaded.
                        let found = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) };
                        *found.map_err(|_| LoadError::NoFunction { name: stringify!($name) })?
                    },)*
                    $($new: {
                        // SAFETY: as above.
                        let found = unsafe { library.get(concat!(stringify!($new), "\0").as_bytes()) };
                        found.ok().map(|function| *function)
                    },)*
                })
            }
        }
    };
}

table! {
    needed {
        cuInit: fn(c_uint);
        cuDriverGetVersion: fn(*mut c_int);
        cuGetErrorName: fn(Answer, *mut *const c_char);
        cuDeviceGetCount: fn(*mut c_int);
        cuDeviceGet: fn(*mut DeviceNumber, c_int);
        cuDeviceGetName: fn(*mut c_char, c_int, DeviceNumber);
        cuDeviceGetUuid_v2: fn(*mut [u8; 16], DeviceNumber);
        cuDeviceGetPCIBusId: fn(*mut c_char, c_int, DeviceNumber);
        cuDeviceTotalMem_v2: fn(*mut usize, DeviceNumber);
        cuDeviceGetAttribute: fn(*mut c_int, c_int, DeviceNumber);
        cuDeviceCanAccessPeer: fn(*mut c_int, DeviceNumber, DeviceNumber);
        cuDevicePrimaryCtxRetain: fn(*mut Handle, DeviceNumber);
        cuDevicePrimaryCtxRelease_v2: fn(DeviceNumber);
        cuCtxPushCurrent_v2: fn(Handle);
        cuCtxPopCurrent_v2: fn(*mut Handle);
        cuThreadExchangeStreamCaptureMode: fn(*mut c_int);
        cuMemAlloc_v2: fn(*mut Address, usize);
        cuMemFree_v2: fn(Address);
        cuMemGetAllocationGranularity: fn(*mut usize, *const Properties, c_uint);
        cuMemCreate: fn(*mut Physical, usize, *const Properties, u64);
        cuMemRelease: fn(Physical);
        cuMemAddressReserve: fn(*mut Address, usize, usize, Address, u64);
        cuMemAddressFree: fn(Address, usize);
        cuMemMap: fn(Address, usize, usize, Physical, u64);
        cuMemUnmap: fn(Address, usize);
        cuMemSetAccess: fn(Address, usize, *const Access, usize);
        cuMemExportToShareableHandle: fn(*mut c_void, Physical, c_uint, u64);
        cuMemImportFromShareableHandle: fn(*mut Physical, *mut c_void, c_uint);
        cuMemRetainAllocationHandle: fn(*mut Physical, *mut c_void);
        cuPointerGetAttribute: fn(*mut c_void, c_int, Address);
        cuIpcGetMemHandle: fn(*mut IpcHandle, Address);
        cuIpcOpenMemHandle_v2: fn(*mut Address, IpcHandle, c_uint);
        cuIpcCloseMemHandle: fn(Address);
        cuMemHostRegister_v2: fn(*mut c_void, usize, c_uint);
        cuMemHostUnregister: fn(*mut c_void);
        cuMemHostGetDevicePointer_v2: fn(*mut Address, *mut c_void, c_uint);
        cuMemcpyAsync: fn(Address, Address, usize, Handle);
        cuMemsetD8Async: fn(Address, u8, usize, Handle);
        cuMemsetD32Async: fn(Address, c_uint, usize, Handle);
        cuStreamCreate: fn(*mut Handle, c_uint);
        cuStreamDestroy_v2: fn(Handle);
        cuStreamQuery: fn(Handle);
        cuStreamSynchronize: fn(Handle);
        cuStreamWaitEvent: fn(Handle, Handle, c_uint);
        cuStreamWaitValue32_v2: fn(Handle, Address, u32, c_uint);
        cuEventCreate: fn(*mut Handle, c_uint);
        cuEventDestroy_v2: fn(Handle);
        cuEventRecord: fn(Handle, Handle);
        cuEventQuery: fn(Handle);
        cuModuleLoadData: fn(*mut Handle, *const c_void);
        cuModuleUnload: fn(Handle);
        cuModuleGetFunction: fn(*mut Handle, Handle, *const c_char);
        cuLaunchKernel: fn(
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void,
        );
    }
    newer {
        cuMemGetHandleForAddressRange: fn(*mut c_void, Address, usize, c_int, u64);
    }
}

impl Table {
    /// What the driver calls one of its answers.
    pub fn name_of(&self, answer: Answer) -> &'static str {
        let mut name = std::ptr::null();
        // SAFETY: the name can be written.
        let found = unsafe { (self.cuGetErrorName)(answer, &raw mut name) };
        if found != super::abi::SUCCESS || name.is_null() {
            return "an answer without a name";
        }
        // SAFETY: names are strings in the library, which is never unloaded.
        unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("an answer without a name")
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Table(..)")
    }
}

/// What [`FabricHandle`] is exported and imported as.
pub const FABRIC_HANDLE_BYTES: usize = size_of::<FabricHandle>();
