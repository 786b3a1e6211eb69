//! NVRTC, where the machine has it: compiles kernels for a device. It needs no driver and no GPU.
//!
//! The unsafe code of this crate is here, in [`driver`](crate::driver) and [`nvml`](crate::nvml), where memory is held and moved (`gpu`, `mover`,
//! `medium`), and in the driver that is software.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int};
use std::fmt;
use std::ptr;

use cudarc::nvrtc::sys;

use crate::Kernel;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Architecture {
    /// The compute capability before the point.
    pub major: u32,
    /// And behind it.
    pub minor: u32,
}

impl Architecture {
    /// A100.
    pub const SM_80: Architecture = Architecture { major: 8, minor: 0 };
    /// H100, H200, GH200.
    pub const SM_90: Architecture = Architecture { major: 9, minor: 0 };
    /// B200, GB200.
    pub const SM_100: Architecture = Architecture { major: 10, minor: 0 };
    /// RTX PRO 6000, RTX 5090.
    pub const SM_120: Architecture = Architecture { major: 12, minor: 0 };

    /// Those that every kernel is known to compile for.
    pub const KNOWN: [Architecture; 4] = [Self::SM_80, Self::SM_90, Self::SM_100, Self::SM_120];
}

impl fmt::Display for Architecture {
    /// As the compiler names it. From 9.0 on with what only this architecture has: what is compiled at run time need not run
    /// anywhere else.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = if self.major >= 9 { "a" } else { "" };
        write!(f, "sm_{}{}{own}", self.major, self.minor)
    }
}

/// NVRTC, loaded.
#[derive(Clone, Copy, Debug)]
pub struct Compiler {
    version: (u32, u32),
}

/// Why nothing was compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The library is not there.
    #[error("libnvrtc.so.12 is not found")]
    NoLibrary,
    /// The library is there, and is too old or damaged: a function is missing.
    #[error("libnvrtc.so.12 has no {name}")]
    NoFunction {
        /// Which.
        name: &'static str,
    },
    /// The library is there and does not work.
    #[error("{call} of libnvrtc answers {code}")]
    Library {
        /// Which function.
        call: &'static str,
        /// Its `nvrtcResult`.
        code: i32,
    },
    /// The source was refused.
    #[error("{kernel} does not compile for {architecture}: {log}")]
    Refused {
        /// Which kernel.
        kernel: &'static str,
        /// For what.
        architecture: Architecture,
        /// What the compiler says.
        log: String,
    },
}

impl CompileError {
    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NoLibrary => {
                "install CUDA 12's NVRTC (the package cuda-nvrtc, or nvidia-cuda-nvrtc-cu12 of PyPI) and let LD_LIBRARY_PATH lead to it"
            }
            Self::NoFunction { .. } | Self::Library { .. } => {
                "install NVRTC again, with its library of builtins beside it"
            }
            Self::Refused { .. } => "a newer NVRTC may know this device; else it is a fault of this library",
        }
    }
}

impl Compiler {
    /// Looks for the library.
    pub fn load() -> Result<Compiler, CompileError> {
        // cudarc panics where a library or a function is missing: so both are asked for before.
        // SAFETY: loading NVRTC runs no code of ours, and its initialisers are made to be run at any time.
        if !unsafe { sys::is_culib_present() } {
            return Err(CompileError::NoLibrary);
        }
        for name in FUNCTIONS {
            // SAFETY: the library is present; a symbol is only looked for, not used.
            if unsafe { sys::culib().get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
                return Err(CompileError::NoFunction { name });
            }
        }
        let (mut major, mut minor): (c_int, c_int) = (0, 0);
        // SAFETY: both can be written.
        check("nvrtcVersion", unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) })?;
        Ok(Compiler { version: (major.unsigned_abs(), minor.unsigned_abs()) })
    }

    /// Which NVRTC it is: what it makes is another from version to version.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Machine code for one architecture, as [`Context::load`](crate::driver::Context::load) takes it.
    pub fn compile(&self, kernel: &Kernel, architecture: Architecture) -> Result<Vec<u8>, CompileError> {
        let program = Program::of(kernel)?;
        program.compile(kernel, &architecture.to_string(), architecture)?;
        program.text("nvrtcGetCUBIN", sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)
    }

    /// PTX that a driver of CUDA 11.4 or later compiles for any GPU from A100 on: what [`Kernel::portable`] is made of.
    ///
    /// NVRTC names the PTX that it knows itself, which older drivers refuse unread; kernels keep to what 7.4 has.
    pub fn portable(&self, kernel: &Kernel) -> Result<String, CompileError> {
        let program = Program::of(kernel)?;
        program.compile(kernel, "compute_80", Architecture::SM_80)?;
        let text = program.text("nvrtcGetPTX", sys::nvrtcGetPTXSize, sys::nvrtcGetPTX)?;
        let text = String::from_utf8_lossy(&text);
        let line = |line: &str| match line.starts_with(".version ") {
            true => PORTABLE_VERSION.to_owned(),
            false => line.trim_end().to_owned(),
        };
        Ok(text.trim_end_matches(['\0', '\n']).lines().map(|text| line(text) + "\n").collect())
    }
}

/// A program of NVRTC's, destroyed when it is dropped.
struct Program(sys::nvrtcProgram);

type Size = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type Text = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

impl Program {
    fn of(kernel: &Kernel) -> Result<Program, CompileError> {
        let (source, name) = (CString::new(kernel.source), CString::new(kernel.name));
        let (source, name) = (source.expect("sources have no NUL"), name.expect("names have no NUL"));
        let mut program = ptr::null_mut();
        // SAFETY: the strings live during the call, and the program can be written; there are no headers.
        let made = unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        check("nvrtcCreateProgram", made)?;
        Ok(Program(program))
    }

    fn compile(&self, kernel: &Kernel, target: &str, architecture: Architecture) -> Result<(), CompileError> {
        let options = [format!("--gpu-architecture={target}"), "--std=c++17".into()];
        let options = options.map(|option| CString::new(option).expect("no NUL"));
        let pointers = options.each_ref().map(|option| option.as_ptr());
        // SAFETY: the program lives; the options are strings that live.
        let compiled =
            unsafe { sys::nvrtcCompileProgram(self.0, pointers.len() as c_int, pointers.as_ptr()) };
        if compiled == sys::nvrtcResult::NVRTC_ERROR_COMPILATION
            || compiled == sys::nvrtcResult::NVRTC_ERROR_INVALID_OPTION
        {
            let log =
                self.text("nvrtcGetProgramLog", sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)?;
            let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
            return Err(CompileError::Refused { kernel: kernel.name, architecture, log });
        }
        check("nvrtcCompileProgram", compiled)
    }

    /// What the program has of a kind.
    fn text(&self, call: &'static str, size: Size, text: Text) -> Result<Vec<u8>, CompileError> {
        let mut bytes = 0;
        // SAFETY: the program lives, and the number can be written.
        check(call, unsafe { size(self.0, &raw mut bytes) })?;
        let mut told = vec![0; bytes];
        // SAFETY: as above; as many bytes can be written as it has said.
        check(call, unsafe { text(self.0, told.as_mut_ptr().cast()) })?;
        Ok(told)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was made, and is not used after this. An answer would say that it was no program.
        unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

fn check(call: &'static str, answer: sys::nvrtcResult) -> Result<(), CompileError> {
    match answer {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        other => Err(CompileError::Library { call, code: other as i32 }),
    }
}

/// All that are called.
const FUNCTIONS: [&str; 10] = [
    "nvrtcVersion",
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
    "nvrtcGetCUBINSize",
    "nvrtcGetCUBIN",
    "nvrtcGetPTXSize",
    "nvrtcGetPTX",
];

/// The directive of the oldest PTX that has all that kernels use: loads and stores past the first-level cache.
const PORTABLE_VERSION: &str = ".version 7.4";
