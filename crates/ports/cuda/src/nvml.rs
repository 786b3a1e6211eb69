//! NVML, looked for at run time: what only the driver's management library tells, which is whether a GPU belongs to an NVLink
//! fabric.
//!
//! Types, numbers and versions are those of `nvml.h` as of NVML 13.3.29. `nvmlDeviceGetGpuFabricInfo` is there from NVML 12.0
//! on, `nvmlDeviceGetGpuFabricInfoV` and its structure 2 from NVML 12.4 on; 13.0 has added structure 3.
#![allow(unsafe_code)]

use std::error::Error as _;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::mem::ManuallyDrop;

use libloading::os::unix;

/// NVML, started. It is shut down when this is dropped.
#[derive(Debug)]
pub struct Nvml {
    table: Table,
}

/// Why there is no NVML.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The library is not there, or it does not load.
    #[error("libnvidia-ml.so.1 cannot be loaded: {reason}")]
    NoLibrary {
        /// What the dynamic linker says.
        reason: String,
    },
    /// A function is missing.
    #[error("libnvidia-ml.so.1 has no {name}")]
    NoFunction {
        /// Which.
        name: &'static str,
    },
    /// It does not start.
    #[error(transparent)]
    Nvml(#[from] NvmlError),
}

impl LoadError {
    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NoLibrary { .. } => {
                "install NVIDIA's driver; in a container, ask the runtime for the GPU's `utility` capability"
            }
            Self::NoFunction { .. } => "update the driver",
            Self::Nvml(_) => "look at what nvidia-smi says, which asks NVML too",
        }
    }
}

/// NVML has refused a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmlError {
    /// Its function.
    pub call: &'static str,
    /// Its answer, an `nvmlReturn_t`.
    pub code: i32,
    /// What NVML says of that.
    pub says: String,
}

impl fmt::Display for NvmlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answers {} ({})", self.call, self.says, self.code)
    }
}

impl std::error::Error for NvmlError {}

/// A GPU's place in the NVLink fabric: the GPUs that a switch, or a rack of them, joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fabric {
    /// How far its registration is.
    pub state: FabricState,
    /// How registration ended, an `nvmlReturn_t`: it means something only once that is completed.
    pub status: i32,
    /// GPUs of one clique of a cluster reach each other.
    pub clique: u32,
    /// The cluster; all zero where the fabric ends with the machine.
    pub cluster: [u8; 16],
    /// What is wrong with it; nothing where the driver is older than that, or the GPU does not say.
    pub health: Health,
}

/// How far the registration of a GPU with the fabric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FabricState {
    /// This GPU is of no fabric, or the driver is too old to say.
    NotSupported,
    /// Nobody has begun.
    NotStarted,
    /// It waits for whoever manages the switches.
    InProgress,
    /// It is done, well or not.
    Completed,
    /// A number that this code does not know.
    Other(u8),
}

/// What a GPU complains of in its fabric.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Fewer links run than there are.
    pub has_degraded_bandwidth: bool,
    /// A route is being recovered.
    pub recovers_route: bool,
    /// A route is broken.
    pub has_unhealthy_route: bool,
    /// Accesses have timed out and are being recovered.
    pub recovers_from_timeout: bool,
    /// The fabric is configured wrongly: NVML's number for how.
    pub misconfiguration: Option<u8>,
}

impl Health {
    /// From NVML's mask: fields of two bits, 1 for yes, 2 for no and 0 for unknown; and one of four bits, for which 0 is unknown
    /// and 1 is right.
    fn from_mask(mask: u32) -> Health {
        let is = |shift: u32| mask >> shift & 0x3 == 1;
        let configuration = (mask >> 8 & 0xf) as u8;
        Health {
            has_degraded_bandwidth: is(0),
            recovers_route: is(2),
            has_unhealthy_route: is(4),
            recovers_from_timeout: is(6),
            misconfiguration: (configuration > 1).then_some(configuration),
        }
    }
}

impl FabricState {
    fn from_number(number: u8) -> FabricState {
        match number {
            0 => FabricState::NotSupported,
            1 => FabricState::NotStarted,
            2 => FabricState::InProgress,
            3 => FabricState::Completed,
            other => FabricState::Other(other),
        }
    }
}

impl Nvml {
    /// Looks for NVML and starts it.
    pub fn load() -> Result<Nvml, LoadError> {
        Nvml::with_table(Table::load()?)
    }

    fn with_table(table: Table) -> Result<Nvml, LoadError> {
        // SAFETY: takes nothing.
        table.check("nvmlInit", unsafe { (table.nvmlInit_v2)() })?;
        Ok(Nvml { table })
    }

    /// The place of the GPU at a PCI address (`0000:18:00.0`) in the NVLink fabric.
    pub fn fabric(&self, pci_address: &str) -> Result<Fabric, NvmlError> {
        let address = CString::new(pci_address).unwrap_or_default();
        let mut device = std::ptr::null_mut();
        // SAFETY: the address lives during the call, and the handle can be written.
        let found =
            unsafe { (self.table.nvmlDeviceGetHandleByPciBusId_v2)(address.as_ptr(), &raw mut device) };
        self.table.check("nvmlDeviceGetHandleByPciBusId", found)?;
        if let Some(ask) = self.table.nvmlDeviceGetGpuFabricInfoV {
            for version in VERSIONS {
                let mut info = VersionedFabricInfo { version, ..VersionedFabricInfo::default() };
                // SAFETY: the device is NVML's, and so many bytes as the version says can be written.
                let asked = unsafe { ask(device, &raw mut info) };
                if asked != ERROR_ARGUMENT_VERSION_MISMATCH {
                    return self.told("nvmlDeviceGetGpuFabricInfoV", asked, || info.fabric());
                }
            }
        }
        let Some(ask) = self.table.nvmlDeviceGetGpuFabricInfo else {
            return Ok(Fabric::none());
        };
        let mut info = FabricInfo::default();
        // SAFETY: the device is NVML's, and the structure can be written.
        let asked = unsafe { ask(device, &raw mut info) };
        self.told("nvmlDeviceGetGpuFabricInfo", asked, || info.fabric(Health::default()))
    }

    fn told(
        &self,
        call: &'static str,
        answer: Answer,
        fabric: impl Fn() -> Fabric,
    ) -> Result<Fabric, NvmlError> {
        match answer {
            ERROR_NOT_SUPPORTED => Ok(Fabric::none()),
            answer => self.table.check(call, answer).map(|()| fabric()),
        }
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: it was started once by this; its devices are not used any more. An answer would say that it was not started.
        unsafe { (self.table.nvmlShutdown)() };
    }
}

impl Fabric {
    /// Of a GPU that belongs to none.
    fn none() -> Fabric {
        FabricInfo::default().fabric(Health::default())
    }
}

/// `nvmlReturn_t`. What NVML writes is a plain integer here, as the CUDA driver's answers are.
type Answer = c_int;
/// `nvmlDevice_t`.
type Device = *mut c_void;

const SUCCESS: Answer = 0;
const ERROR_NOT_SUPPORTED: Answer = 3;
const ERROR_ARGUMENT_VERSION_MISMATCH: Answer = 25;

/// `nvmlGpuFabricInfo_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct FabricInfo {
    cluster: [u8; 16],
    status: Answer,
    clique: c_uint,
    state: u8,
}

/// `nvmlGpuFabricInfo_v3_t`, which begins with all of `nvmlGpuFabricInfo_v2_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct VersionedFabricInfo {
    version: c_uint,
    cluster: [u8; 16],
    status: Answer,
    clique: c_uint,
    state: u8,
    health_mask: c_uint,
    health_summary: u8,
}

/// Those of the structure that are asked for, in this order: `nvmlGpuFabricInfo_v2`, which drivers since 12.4 know, and
/// `nvmlGpuFabricInfo_v3`, for one that has dropped it. A version is a number above the structure's length.
const VERSIONS: [c_uint; 2] = [2 << 24 | 36, 3 << 24 | 40];

impl FabricInfo {
    fn fabric(&self, health: Health) -> Fabric {
        let FabricInfo { cluster, status, clique, state } = *self;
        Fabric { state: FabricState::from_number(state), status, clique, cluster, health }
    }
}

impl VersionedFabricInfo {
    fn fabric(&self) -> Fabric {
        let VersionedFabricInfo { cluster, status, clique, state, .. } = *self;
        FabricInfo { cluster, status, clique, state }.fabric(Health::from_mask(self.health_mask))
    }
}

macro_rules! table {
    (
        needed { $($name:ident: fn($($needed:ty),* $(,)?) -> $back:ty;)* }
        newer { $($new:ident: fn($($argument:ty),* $(,)?);)* }
    ) => {
        /// NVML's functions, under their own names.
        #[allow(non_snake_case)]
        #[derive(Clone, Copy)]
        struct Table {
            $($name: unsafe extern "C" fn($($needed),*) -> $back,)*
            $(
                /// `None`: the library is older than it.
                $new: Option<unsafe extern "C" fn($($argument),*) -> Answer>,
            )*
        }

        impl Table {
            /// Looks for the library, and in it for every function.
            fn load() -> Result<Table, LoadError> {
                // SAFETY: the name is NVML's own, and what runs when it is loaded asks nothing of its caller.
                let opened = unsafe { unix::Library::open(Some(FILE), unix::RTLD_NOW | unix::RTLD_LOCAL) };
                // What the linker said is the source of libloading's error.
                let opened = opened.map_err(|error| LoadError::NoLibrary {
                    reason: error.source().map_or_else(|| error.to_string(), ToString::to_string),
                })?;
                // Never closed: the functions are copied out of it.
                let library = ManuallyDrop::new(opened);
                Ok(Table {
                    $($name: {
                        // SAFETY: the function is declared as `nvml.h` declares the one of this name, with integers in the
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
        nvmlInit_v2: fn() -> Answer;
        nvmlShutdown: fn() -> Answer;
        nvmlErrorString: fn(Answer) -> *const c_char;
        nvmlDeviceGetHandleByPciBusId_v2: fn(*const c_char, *mut Device) -> Answer;
    }
    newer {
        nvmlDeviceGetGpuFabricInfo: fn(Device, *mut FabricInfo);
        nvmlDeviceGetGpuFabricInfoV: fn(Device, *mut VersionedFabricInfo);
    }
}

/// The name that the driver's library has had since NVML is there.
const FILE: &str = "libnvidia-ml.so.1";

impl Table {
    fn check(&self, call: &'static str, answer: Answer) -> Result<(), NvmlError> {
        match answer {
            SUCCESS => Ok(()),
            code => Err(NvmlError { call, code, says: self.words_of(code) }),
        }
    }

    fn words_of(&self, answer: Answer) -> String {
        // SAFETY: any number may be asked for.
        let words = unsafe { (self.nvmlErrorString)(answer) };
        if words.is_null() {
            return "an answer without a name".to_owned();
        }
        // SAFETY: words are strings in the library, which is never unloaded.
        unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Table(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const RACK: &str = "0008:01:00.0";
    const ALONE: &str = "0000:18:00.0";

    extern "C" fn good() -> Answer {
        SUCCESS
    }

    extern "C" fn words(answer: Answer) -> *const c_char {
        match answer {
            ERROR_NOT_FOUND => c"Not Found".as_ptr(),
            _ => std::ptr::null(),
        }
    }

    /// The device is the last number of the bus.
    extern "C" fn by_address(address: *const c_char, into: *mut Device) -> Answer {
        // SAFETY: callers give a string, and a place that can be written.
        let number = match unsafe { CStr::from_ptr(address) }.to_str() {
            Ok(RACK) => 1,
            Ok(ALONE) => 2,
            _ => return ERROR_NOT_FOUND,
        };
        // SAFETY: as above.
        unsafe { into.write(std::ptr::without_provenance_mut(number)) };
        SUCCESS
    }

    extern "C" fn info(device: Device, into: *mut FabricInfo) -> Answer {
        if device.addr() != 1 {
            return ERROR_NOT_SUPPORTED;
        }
        // SAFETY: callers give a structure that can be written.
        unsafe { into.write(FabricInfo { cluster: [7; 16], status: 0, clique: 3, state: 2 }) };
        SUCCESS
    }

    /// One that knows the version `KNOWN` alone.
    extern "C" fn versioned<const KNOWN: usize>(device: Device, into: *mut VersionedFabricInfo) -> Answer {
        // SAFETY: callers give a structure of which all that its version says can be read and written.
        let info = unsafe { &mut *into };
        if info.version != VERSIONS[KNOWN] {
            return ERROR_ARGUMENT_VERSION_MISMATCH;
        }
        if device.addr() != 1 {
            return ERROR_NOT_SUPPORTED;
        }
        *info = VersionedFabricInfo {
            cluster: [7; 16],
            status: 0,
            clique: 3,
            state: 3,
            // Bandwidth is degraded, no route is; the configuration is number 4.
            health_mask: 1 | 2 << 2 | 2 << 4 | 4 << 8,
            ..*info
        };
        SUCCESS
    }

    extern "C" fn no_version(_device: Device, _into: *mut VersionedFabricInfo) -> Answer {
        ERROR_ARGUMENT_VERSION_MISMATCH
    }

    fn table() -> Table {
        Table {
            nvmlInit_v2: good,
            nvmlShutdown: good,
            nvmlErrorString: words,
            nvmlDeviceGetHandleByPciBusId_v2: by_address,
            nvmlDeviceGetGpuFabricInfo: Some(info),
            nvmlDeviceGetGpuFabricInfoV: Some(versioned::<0>),
        }
    }

    fn fabric(table: Table, address: &str) -> Result<Fabric, NvmlError> {
        Nvml::with_table(table).expect("it starts").fabric(address)
    }

    #[test]
    fn structures_are_as_long_as_their_versions_say() {
        // Without what 3 has added: its byte, and three to fill.
        assert_eq!(VERSIONS[0] & 0xff_ffff, size_of::<VersionedFabricInfo>() as c_uint - 4);
        assert_eq!(VERSIONS[1] & 0xff_ffff, size_of::<VersionedFabricInfo>() as c_uint);
        assert_eq!(offset_of!(VersionedFabricInfo, health_summary), 36);
        assert_eq!(size_of::<FabricInfo>(), 28);
    }

    #[test]
    fn the_newest_function_that_answers_is_believed() {
        let health = Health { has_degraded_bandwidth: true, misconfiguration: Some(4), ..Health::default() };
        let completed =
            Fabric { state: FabricState::Completed, status: 0, clique: 3, cluster: [7; 16], health };
        assert_eq!(fabric(table(), RACK), Ok(completed));
        let newer = Table { nvmlDeviceGetGpuFabricInfoV: Some(versioned::<1>), ..table() };
        assert_eq!(fabric(newer, RACK), Ok(completed));
        let waiting = Fabric { state: FabricState::InProgress, health: Health::default(), ..completed };
        for versioned in [None, Some(no_version as _)] {
            let older = Table { nvmlDeviceGetGpuFabricInfoV: versioned, ..table() };
            assert_eq!(fabric(older, RACK), Ok(waiting));
            assert_eq!(fabric(older, ALONE), Ok(Fabric::none()));
        }
        let oldest = Table { nvmlDeviceGetGpuFabricInfo: None, nvmlDeviceGetGpuFabricInfoV: None, ..table() };
        assert_eq!(fabric(oldest, RACK), Ok(Fabric::none()));
    }

    #[test]
    fn a_gpu_of_no_fabric_is_no_error_and_an_unknown_one_is() {
        assert_eq!(fabric(table(), ALONE), Ok(Fabric::none()));
        let error = fabric(table(), "0000:99:00.0").expect_err("nobody is there");
        assert_eq!(error.to_string(), "nvmlDeviceGetHandleByPciBusId answers Not Found (6)");
        assert!(fabric(table(), "\0").is_err());
    }

    #[test]
    fn states_and_masks_that_are_not_known_say_nothing() {
        assert_eq!(FabricState::from_number(9), FabricState::Other(9));
        for mask in [0, 0x2 | 0x2 << 2 | 0x2 << 4 | 0x2 << 6 | 1 << 8, 0x3 | 0xffff_f000] {
            assert_eq!(Health::from_mask(mask), Health::default(), "{mask:#x}");
        }
    }

    #[test]
    fn what_does_not_start_is_not_shut_down() {
        static ENDED: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn broken() -> Answer {
            ERROR_DRIVER_NOT_LOADED
        }
        extern "C" fn end() -> Answer {
            ENDED.fetch_add(1, Ordering::Relaxed);
            SUCCESS
        }
        let refused = Nvml::with_table(Table { nvmlInit_v2: broken, nvmlShutdown: end, ..table() });
        let error = refused.expect_err("it does not start");
        assert_eq!(error.to_string(), "nvmlInit answers an answer without a name (9)");
        assert!(!error.advice().is_empty());
        assert_eq!(ENDED.load(Ordering::Relaxed), 0);
        drop(Nvml::with_table(Table { nvmlShutdown: end, ..table() }));
        assert_eq!(ENDED.load(Ordering::Relaxed), 1);
    }

    const ERROR_NOT_FOUND: Answer = 6;
    const ERROR_DRIVER_NOT_LOADED: Answer = 9;
}
