//! Compiles the kernels for the emulator, as part of the build script (feature `emulator`).
//!
//! Makes two shared objects in OUT_DIR from the same sources: `libemulator.so` and `libemulator_checked.so`, whose kernels
//! are instrumented (see simt/README.md). They are loaded at run time, so that their equal symbols never meet. Objects are
//! kept until a file that they include changes.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-g1", // lines for the messages
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas", // #pragma unroll
    "-Wno-psabi",           // a note on 64-byte alignment
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fno-math-errno",
    "-ffp-contract=off",        // the source says where an fma is
    "-fstack-clash-protection", // a large frame must meet the guard page, not jump it
    "-fno-gnu-unique",          // the next three: __shared__ variables are thread_local ones whose address we decide
    "-fno-extern-tls-init",
    "-mtls-dialect=gnu",
];
const KERNEL_FLAGS: &[&str] = &["-x", "c++", "-include", "simt/include/simt.h", "-Isimt/include"];
const CHECKED_KERNEL_FLAGS: &[&str] = &[
    "-fsanitize=thread,alignment,shift,bounds,float-cast-overflow,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0",
];

struct Object {
    source: PathBuf,
    object: PathBuf,
    arguments: Vec<String>,
}

impl Object {
    /// That of a source, in the directory `kept`.
    fn of(source: &Path, kept: &Path, common: &[String], checked: bool) -> Self {
        let is_kernel = source.extension().is_some_and(|e| e == "cu");
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        let kind = if is_kernel { "cu" } else { "cpp" };
        let object = kept.join(format!("{name}.{kind}{}.o", if checked { ".checked" } else { "" }));
        let mut arguments = common.to_vec();
        if checked {
            arguments.push("-DSIMT_CHECKED".into());
        }
        if !is_kernel {
            arguments.push("-Isimt/include".into());
        } else {
            arguments.extend(KERNEL_FLAGS.iter().map(|f| f.to_string()));
            let extra = if checked { CHECKED_KERNEL_FLAGS } else { &[] };
            arguments.extend(extra.iter().map(|f| f.to_string()));
        }
        arguments.extend(["-MMD", "-MF"].map(String::from));
        arguments.push(object.with_extension("d").display().to_string());
        arguments.push("-c".into());
        arguments.push(source.display().to_string());
        arguments.push("-o".into());
        arguments.push(object.display().to_string());
        Self { source: source.into(), object, arguments }
    }

    /// Digest of how it is compiled and of every file of ours that went into it last time.
    fn fingerprint(&self) -> Option<String> {
        let rule = fs::read_to_string(self.object.with_extension("d")).ok()?;
        let mut hasher = DefaultHasher::new();
        (env::var_os("CXX"), &self.arguments).hash(&mut hasher);
        for header in rule.split_whitespace().filter(|word| word.starts_with("kernels") || word.starts_with("simt")) {
            fs::read(header).ok()?.hash(&mut hasher);
        }
        Some(hasher.finish().to_string())
    }

    fn is_stale(&self) -> bool {
        let made = fs::read_to_string(self.object.with_extension("fingerprint")).ok();
        !self.object.exists() || made.is_none() || made != self.fingerprint()
    }

    fn compile(&self, compiler: &str) -> Result<(), String> {
        run(compiler, &self.arguments)?;
        let fingerprint = self.object.with_extension("fingerprint");
        fs::write(&fingerprint, self.fingerprint().unwrap_or_default())
            .map_err(|e| format!("{}: {e}", fingerprint.display()))
    }
}

fn run(compiler: &str, arguments: &[String]) -> Result<(), String> {
    let output = Command::new(compiler).args(arguments).output().map_err(|e| {
        format!("the feature `emulator` needs a C++17 compiler: cannot run `{compiler}` (set CXX to another): {e}")
    })?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{compiler} {}\n{said}", arguments.join(" ")));
    }
    said.lines().for_each(|line| println!("cargo:warning={line}"));
    Ok(())
}

fn sources(directory: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|e| e.path());
    let mut found: Vec<_> = entries.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    found.sort();
    found
}

/// Compiles several at a time, as many as cargo lets this build have jobs.
fn compile(mut stale: Vec<&Object>, compiler: &str) -> Result<(), String> {
    // The largest sources come first, so that no job is left alone at the end.
    stale.sort_by_key(|o| fs::metadata(&o.source).map_or(0, |m| m.len()));
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let (queue, errors) = (Mutex::new(stale), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(object) = queue.lock().ok().and_then(|mut q| q.pop()) {
                    if let (Err(e), Ok(mut errors)) = (object.compile(compiler), errors.lock()) {
                        errors.push(e);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap_or_default();
    if errors.is_empty() { Ok(()) } else { Err(errors.join("\n\n")) }
}

/// Builds both libraries and gives the crate their paths as `EMULATOR_LIBRARY` and `EMULATOR_LIBRARY_CHECKED`. `structs` is
/// the file that asserts the layout of the structs that host and device share.
pub fn build(structs: &Path) -> Result<(), String> {
    for name in ["CXX", "CXXFLAGS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    for directory in ["kernels", "simt/include", "simt/src"] {
        println!("cargo:rerun-if-changed={directory}");
    }
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return Err("the emulator's context switch is written for x86-64".into());
    }
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".into());
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    // One place serves all builds of this checkout, as they differ in the crate's features and not in the kernels.
    let kept = out.ancestors().nth(4).ok_or("OUT_DIR is not below a target directory")?.join("emulator");
    fs::create_dir_all(&kept).map_err(|e| format!("{}: {e}", kept.display()))?;
    let here = env::current_dir().map_err(|e| e.to_string())?;

    let mut common: Vec<String> = FLAGS.iter().map(|f| f.to_string()).collect();
    common.push(format!("-ffile-prefix-map={}=.", here.display()));
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        common.extend(["-mavx2", "-mfma", "-mf16c"].map(String::from)); // 4x on mma
    }
    common.extend(env::var("CXXFLAGS").unwrap_or_default().split_whitespace().map(String::from));

    run(&compiler, &["-std=c++17", "-fsyntax-only", &structs.display().to_string()].map(String::from))?;
    let mut kernels = sources("kernels", "cu");
    kernels.extend(sources("kernels/emulator", "cu"));
    let mut runtime = sources("simt/src", "cpp");
    runtime.retain(|path| path.file_stem().is_some_and(|name| name != "simt-check"));
    let mut libraries = Vec::new();
    for checked in [false, true] {
        let objects = kernels.iter().chain(&runtime).map(|source| Object::of(source, &kept, &common, checked));
        libraries.push((if checked { "_checked" } else { "" }, objects.collect::<Vec<_>>()));
    }
    compile(libraries.iter().flat_map(|l| &l.1).filter(|o| o.is_stale()).collect(), &compiler)?;

    for (suffix, objects) in &libraries {
        let library = out.join(format!("libemulator{suffix}.so"));
        let mut arguments: Vec<String> =
            ["-shared", "-pthread", "-Wl,-Bsymbolic,--no-undefined", "-o"].map(String::from).into();
        arguments.push(library.display().to_string());
        arguments.extend(objects.iter().map(|o| o.object.display().to_string()));
        arguments.push("-ldl".into());
        run(&compiler, &arguments)?;
        println!("cargo:rustc-env=EMULATOR_LIBRARY{}={}", suffix.to_uppercase(), library.display());
        // How to make a library of another source later, in lines: the compiler, its flags, and the runtime.
        let extra: &[&str] = if suffix.is_empty() { &[] } else { &["-DSIMT_CHECKED"] };
        let checked = if suffix.is_empty() { &[] } else { CHECKED_KERNEL_FLAGS };
        let runtime = objects.iter().filter(|o| o.source.extension().is_some_and(|e| e == "cpp"));
        let words = [KERNEL_FLAGS, extra, checked, &["-Ikernels"]].concat().into_iter().map(String::from);
        let recipe = [compiler.clone()].into_iter().chain(common.iter().cloned()).chain(words).collect::<Vec<_>>();
        let parts = runtime.map(|o| o.object.display().to_string()).collect::<Vec<_>>();
        let path = out.join(format!("recipe{suffix}"));
        fs::write(&path, format!("{}\n\n{}", recipe.join("\n"), parts.join("\n")))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        println!("cargo:rustc-env=EMULATOR_RECIPE{}={}", suffix.to_uppercase(), path.display());
    }
    Ok(())
}
