//! Compiled kernels on disk, so that a process does not compile what another has.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::Kernel;
use crate::compiler::{Architecture, CompileError, Compiler};

/// A folder of compiled kernels. Processes share it; whatever is wrong with it costs time only.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// Where caches are: `$XDG_CACHE_HOME/crossdock/kernels`, or `~/.cache/crossdock/kernels`.
    pub fn usual() -> Cache {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        Cache { folder: base.filter(|base| base.is_absolute()).map(|base| base.join("crossdock/kernels")) }
    }

    /// In a folder, which is made if it is not there.
    pub fn at(folder: impl Into<PathBuf>) -> Cache {
        Cache { folder: Some(folder.into()) }
    }

    /// None: everything is compiled each time.
    pub fn none() -> Cache {
        Cache { folder: None }
    }

    /// A kernel for a device: as it was compiled before by this compiler, or compiled now.
    pub fn get(
        &self,
        compiler: &Compiler,
        kernel: &Kernel,
        architecture: Architecture,
    ) -> Result<Vec<u8>, CompileError> {
        self.get_with(kernel, architecture, compiler.version(), || compiler.compile(kernel, architecture))
    }

    fn get_with<E>(
        &self,
        kernel: &Kernel,
        architecture: Architecture,
        version: (u32, u32),
        compile: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let folder = self.folder.as_deref().filter(|folder| match own(folder) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(folder = %folder.display(), "kernels are not kept: {error}");
                false
            }
        });
        let Some(folder) = folder else { return compile() };
        let path = folder.join(name(kernel, architecture, version));
        if let Some(code) = fs::read(&path).ok().and_then(whole) {
            return Ok(code);
        }
        let code = compile()?;
        if let Err(error) = write(&path, &code) {
            tracing::warn!(path = %path.display(), "a compiled kernel is not kept: {error}");
        }
        Ok(code)
    }
}

/// What is in there runs on the GPU with all that this process may: so nobody else may write there.
fn own(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let found = fs::symlink_metadata(folder)?;
    // The owner of what this process makes.
    let own = fs::metadata("/proc/self")?.uid();
    let is_ours = found.is_dir() && found.uid() == own && found.mode() & 0o022 == 0;
    let says = || io::Error::other("the folder is another user's, or others may write there");
    is_ours.then_some(()).ok_or_else(says)
}

/// Everything that the code depends on.
fn name(kernel: &Kernel, architecture: Architecture, version: (u32, u32)) -> String {
    let sum = Sha256::digest(kernel.source);
    let sum: String = sum[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let file = kernel.name.trim_end_matches(".cu");
    format!("{file}-{sum}-{architecture}-nvrtc{}.{}.cubin", version.0, version.1)
}

/// Behind the code stands its sum: a file that a full disk or a killed process has left is no code.
fn whole(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let sum = file.split_off(file.len().checked_sub(4)?);
    (crc32c::crc32c(&file).to_le_bytes() == *sum).then_some(file)
}

/// Whoever reads sees all of it or nothing, however many write at the same time.
fn write(path: &Path, code: &[u8]) -> io::Result<()> {
    let mut random = [0; 8];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut random)?;
    let draft = path.with_extension(format!("{:016x}", u64::from_le_bytes(random)));
    let written =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft).and_then(|mut file| {
            file.write_all(code)?;
            file.write_all(&crc32c::crc32c(code).to_le_bytes())?;
            fs::rename(&draft, path)
        });
    if written.is_err() {
        let _ = fs::remove_file(&draft);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::PAGES;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("crossdock-cache-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&folder);
            Folder(folder)
        }

        fn files(&self) -> Vec<PathBuf> {
            fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn get(cache: &Cache, version: (u32, u32), code: &[u8]) -> Result<Vec<u8>, ()> {
        cache.get_with(&PAGES, Architecture::SM_90, version, || Ok(code.to_vec()))
    }

    #[test]
    fn what_was_compiled_is_not_compiled_again() {
        let folder = Folder::new("kept");
        let cache = Cache::at(&folder.0);
        assert_eq!(get(&cache, (12, 9), b"first").unwrap(), b"first");
        assert_eq!(get(&cache, (12, 9), b"second").unwrap(), b"first");
        // Another compiler makes other code, and so does another device.
        assert_eq!(get(&cache, (13, 0), b"third").unwrap(), b"third");
        let other = cache.get_with(&PAGES, Architecture::SM_100, (12, 9), || Ok::<_, ()>(b"fourth".to_vec()));
        assert_eq!(other.unwrap(), b"fourth");
        let changed = Kernel { source: "// changed", ..PAGES };
        let other = cache.get_with(&changed, Architecture::SM_90, (12, 9), || Ok::<_, ()>(b"fifth".to_vec()));
        assert_eq!(other.unwrap(), b"fifth");
        assert_eq!(folder.files().len(), 4);
        assert_eq!(cache.get_with(&changed, Architecture::SM_80, (12, 9), || Err::<Vec<u8>, _>(7)), Err(7));
        assert_eq!(folder.files().len(), 4, "what does not compile is not kept");
    }

    #[test]
    fn a_damaged_file_is_written_anew() {
        let folder = Folder::new("damaged");
        let cache = Cache::at(&folder.0);
        get(&cache, (12, 9), b"some code").unwrap();
        let file = &folder.files()[0];
        for damage in [&b""[..], b"abc", b"some codeabcd", b"another code"] {
            fs::write(file, damage).unwrap();
            assert_eq!(get(&cache, (12, 9), b"right").unwrap(), b"right");
            assert_eq!(get(&cache, (12, 9), b"not asked").unwrap(), b"right");
        }
    }

    #[test]
    fn a_folder_that_others_may_write_is_not_used() {
        let folder = Folder::new("open");
        let cache = Cache::at(&folder.0);
        get(&cache, (12, 9), b"kept").unwrap();
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(get(&cache, (12, 9), b"compiled").unwrap(), b"compiled");
        // Nor is a link to one, or a file in its place.
        let link = Folder::new("link");
        std::os::unix::fs::symlink(&folder.0, &link.0).unwrap();
        assert_eq!(get(&Cache::at(&link.0), (12, 9), b"compiled").unwrap(), b"compiled");
        fs::remove_file(&link.0).unwrap();
        assert_eq!(get(&Cache::at(folder.files()[0].clone()), (12, 9), b"compiled").unwrap(), b"compiled");
        assert_eq!(get(&Cache::none(), (12, 9), b"compiled").unwrap(), b"compiled");
    }

    #[test]
    fn many_may_write_at_the_same_time() {
        let folder = Folder::new("many");
        let cache = Cache::at(&folder.0);
        let code: Vec<u8> = (0..100_000u32).map(|byte| byte as u8).collect();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for version in 0..20 {
                        assert_eq!(get(&cache, (version, 0), &code).unwrap(), code);
                    }
                });
            }
        });
        assert_eq!(folder.files().len(), 20);
    }
}
