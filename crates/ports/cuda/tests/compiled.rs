//! Every kernel compiles for every architecture that is known, where NVRTC is found.

use crossdock_cuda::cache::Cache;
use crossdock_cuda::compiler::{Architecture, CompileError, Compiler};
use crossdock_cuda::{KERNELS, Kernel};
use sha2::{Digest, Sha256};

fn compiler() -> Option<Compiler> {
    match Compiler::load() {
        Ok(compiler) => Some(compiler),
        Err(error @ CompileError::NoLibrary) => {
            assert!(error.advice().contains("LD_LIBRARY_PATH"));
            // .ci/run's step `kernels` fails on this word.
            eprintln!("SKIPPED: {error}: {}", error.advice());
            None
        }
        Err(other) => panic!("{other}: {}", other.advice()),
    }
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    let Some(compiler) = compiler() else { return };
    for kernel in &KERNELS {
        for architecture in Architecture::KNOWN {
            let code = compiler.compile(kernel, architecture).unwrap_or_else(|error| panic!("{error}"));
            // An ELF file that has all functions.
            assert_eq!(&code[..4], b"\x7fELF", "{} for {architecture}", kernel.name);
            for function in kernel.functions {
                let is_there = code.windows(function.len()).any(|name| name == function.as_bytes());
                assert!(is_there, "{function} for {architecture}");
            }
            println!(
                "{} for {architecture}: {} bytes, NVRTC {:?}",
                kernel.name,
                code.len(),
                compiler.version()
            );
        }
    }
}

/// The PTX that comes with the library is of this source: its first line has the source's sum. `UPDATE_KERNELS=1` makes it anew,
/// where NVRTC is.
#[test]
fn what_comes_along_is_of_the_source() {
    let own = Kernel {
        name: "consumer.cu",
        source: include_str!("kernels/consumer.cu"),
        functions: &["crossdock_consume"],
        portable: include_str!("kernels/consumer.ptx"),
    };
    for (folder, kernel) in KERNELS.iter().map(|kernel| ("src", kernel)).chain([("tests", &own)]) {
        let sum: String = Sha256::digest(kernel.source).iter().map(|byte| format!("{byte:02x}")).collect();
        let first = format!("// {} of the sum {sum}, as Compiler::portable makes it.", kernel.name);
        if std::env::var_os("UPDATE_KERNELS").is_some() {
            let text = compiler().expect("NVRTC").portable(kernel).unwrap();
            let path = format!("{folder}/kernels/{}", kernel.name.replace(".cu", ".ptx"));
            std::fs::write(path, format!("{first}\n{text}")).unwrap();
            continue;
        }
        let (found, text) = kernel.portable.split_once('\n').unwrap();
        assert_eq!(found, first, "UPDATE_KERNELS=1 makes it anew");
        assert!(text.contains("\n.version 7.4\n.target sm_80\n"));
        for function in kernel.functions {
            assert!(text.contains(&format!(".visible .entry {function}(")));
        }
        let Some(compiler) = compiler() else { continue };
        let made = compiler.portable(kernel).unwrap();
        let release = |text: &str| text.lines().find(|line| line.contains("release")).unwrap().to_owned();
        match release(&made) == release(text) {
            true => assert!(made == text, "{}: made of the same source by the same compiler", kernel.name),
            false => println!("not compared: this NVRTC is another: {}", release(&made)),
        }
    }
}

#[test]
fn what_does_not_compile_is_refused_with_the_compiler_s_words() {
    let Some(compiler) = compiler() else { return };
    let broken =
        Kernel { name: "broken.cu", source: "__global__ void f() { no_such_name(); }", ..KERNELS[0] };
    let refused = compiler.compile(&broken, Architecture::SM_90).unwrap_err();
    assert!(
        matches!(&refused, CompileError::Refused { kernel: "broken.cu", log, .. } if log.contains("no_such_name"))
    );
    let unknown = Architecture { major: 99, minor: 9 };
    let refused = compiler.compile(&KERNELS[0], unknown).unwrap_err();
    assert!(
        matches!(&refused, CompileError::Refused { .. }) && refused.to_string().contains("sm_999a"),
        "{refused}"
    );
}

#[test]
fn a_second_process_need_not_compile() {
    let Some(compiler) = compiler() else { return };
    let folder = std::env::temp_dir().join(format!("crossdock-compiled-{}", std::process::id()));
    let cache = Cache::at(&folder);
    let code = cache.get(&compiler, &KERNELS[0], Architecture::SM_90).unwrap();
    let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let written = std::fs::metadata(&file).unwrap().modified().unwrap();
    assert_eq!(cache.get(&compiler, &KERNELS[0], Architecture::SM_90).unwrap(), code);
    assert_eq!(std::fs::metadata(&file).unwrap().modified().unwrap(), written);
    std::fs::remove_dir_all(folder).unwrap();
}
