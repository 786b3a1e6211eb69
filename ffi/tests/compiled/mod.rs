//! Programs in C and C++, compiled against the header and linked with the library of this build.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// The shared library that cargo has built beside this test.
pub fn library() -> PathBuf {
    built("libcrossdock_ffi.so")
}

fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let found = test.parent().expect("a folder").join(name);
    assert!(found.exists(), "{} is not built", found.display());
    found
}

/// A program in a folder of its own, which goes with it.
pub struct Built {
    folder: PathBuf,
}

impl Drop for Built {
    fn drop(&mut self) {
        // What is left behind lies where temporary files do.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

const STRICT: [&str; 6] = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wpedantic"];

impl Built {
    pub fn c(source: &Path, include: &Path) -> Built {
        Built::new("cc", &["-std=c11"], source, include, false)
    }

    pub fn c_static(source: &Path, include: &Path) -> Built {
        Built::new("cc", &["-std=c11"], source, include, true)
    }

    /// From a text.
    pub fn c_of(source: &str, include: &Path) -> Built {
        let built = Built::folder();
        let path = built.folder.join("program.c");
        std::fs::write(&path, source).expect("it can be written");
        built.compile("cc", &["-std=c11"], &path, include, false);
        built
    }

    pub fn cpp(compiler: &str, arguments: &[&str], source: &Path) -> Built {
        let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
        let arguments: Vec<&str> = ["-std=c++17"].into_iter().chain(arguments.iter().copied()).collect();
        Built::new(compiler, &arguments, source, &include, false)
    }

    fn new(compiler: &str, arguments: &[&str], source: &Path, include: &Path, is_static: bool) -> Built {
        let built = Built::folder();
        built.compile(compiler, arguments, source, include, is_static);
        built
    }

    fn folder() -> Built {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("crossdock-abi-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir(&folder).expect("a folder can be made");
        Built { folder }
    }

    fn compile(&self, compiler: &str, arguments: &[&str], source: &Path, include: &Path, is_static: bool) {
        let mut command = Command::new(compiler);
        command
            .args(arguments)
            .args(STRICT)
            .arg("-I")
            .arg(include)
            .arg("-o")
            .arg(self.folder.join("program"));
        command.arg(source);
        if is_static {
            command.arg(built("libcrossdock_ffi.a")).args(["-lpthread", "-ldl", "-lm"]);
        } else {
            // Under the name that the library has when it is installed.
            std::os::unix::fs::symlink(library(), self.folder.join("libcrossdock.so.1")).expect("a link");
            command.arg(self.folder.join("libcrossdock.so.1")).arg("-lpthread");
        }
        let output = command.output().unwrap_or_else(|error| panic!("{compiler}: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn run(&self, arguments: &[&str]) -> String {
        self.finish(Command::new(self.folder.join("program")).args(arguments))
    }

    pub fn run_under(&self, tool: &[&str]) -> String {
        self.finish(Command::new(tool[0]).args(&tool[1..]).arg(self.folder.join("program")))
    }

    fn finish(&self, command: &mut Command) -> String {
        let output = command.env("LD_LIBRARY_PATH", &self.folder).output().expect("it starts");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}\n{told}\n{complained}", output.status);
        told
    }
}
