//! Compiles the kernels with nvcc, as part of the build script (feature `cuda`).
//!
//! Makes one fatbin of each file. It has the machine code for every architecture, and the PTX for the lowest, which the
//! driver compiles for cards that have none. There launches do not overlap, as code for sm_80 does not wait. `*_hopper.cu`
//! gives machine code for sm_90a alone, which the driver of any other card refuses to load. Fatbins lie in the target
//! directory under a hash of all that went into them, so that debug, release and every set of features share them.
//!
//! The published package has them in `compiled/` (`make package`), each under the digest of its sources and flags. They
//! serve where there is no nvcc.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

use super::structs::{add_file, digest};

/// The architectures, unless EDM2K_CUDA_ARCHS names others, such as `89,90`.
const ARCHS: &str = "80,86,89,90,120";
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O3",
    "-fatbin",
    "--compress-mode=size", // a tenth
    "-Werror=all-warnings",
    "-Xptxas=-warn-spills,-Werror",
];

/// With this flag compute-sanitizer names source lines. It takes half of a fatbin, so it is used where one architecture is
/// compiled for.
const LINES: &str = "-lineinfo";

/// The place of compiled kernels in the package, and the file with the version of their compiler.
const CARRIED: &str = "compiled";

/// A kernel file and how it is compiled.
struct Kernel {
    name: String,
    source: PathBuf,
    flags: Vec<String>,
    /// It and all that it includes.
    files: BTreeMap<PathBuf, String>,
}

impl Kernel {
    fn new(source: PathBuf, flags: Vec<String>) -> Result<Self, String> {
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut files = BTreeMap::new();
        add_file(source.clone(), &mut files)?;
        Ok(Self { name, source, flags, files })
    }

    /// Where the package has it, compiled.
    fn carried(&self) -> PathBuf {
        let digest = digest(self.files.values().chain(&self.flags));
        Path::new(CARRIED).join(format!("{}-{digest:016x}.fatbin", self.name))
    }
}

/// The kernel files, by name.
fn kernels(archs: &BTreeSet<u32>) -> Result<Vec<Kernel>, String> {
    let common = FLAGS.iter().map(|flag| flag.to_string());
    let every = archs.iter().enumerate().map(|(i, arch)| {
        let code = if i == 0 { format!("[sm_{arch},compute_{arch}]") } else { format!("sm_{arch}") };
        // One PTX serves all cards that come later. Making it takes half of the time, and nothing here asks for more.
        let first = archs.iter().find(|first| *first / 10 == arch / 10).unwrap_or(arch);
        format!("-gencode=arch=compute_{first},code={code}")
    });
    let every: Vec<String> = common.clone().chain(every).collect();
    // Code for Hopper's own instructions runs on no other card, not even a later one.
    let hopper: Vec<String> = common.chain(["-gencode=arch=compute_90a,code=sm_90a".into()]).collect();
    let entries = fs::read_dir("kernels").map_err(|e| format!("kernels: {e}"))?;
    let sources = entries.flatten().map(|entry| entry.path()).filter(|p| p.extension().is_some_and(|e| e == "cu"));
    let mut kernels = Vec::new();
    for source in sources {
        match source.file_stem().is_some_and(|name| name.to_string_lossy().ends_with("_hopper")) {
            true if !archs.contains(&90) => {}
            true => kernels.push(Kernel::new(source, hopper.clone())?),
            false => kernels.push(Kernel::new(source, every.clone())?),
        }
    }
    kernels.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(kernels)
}

/// The fatbins that the package has, and the version of their compiler.
fn carried(kernels: &[Kernel]) -> Result<(Vec<PathBuf>, String), String> {
    println!("cargo:rerun-if-changed={CARRIED}");
    let path = Path::new(CARRIED).join("compiler");
    let version = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    match kernels.iter().find(|kernel| !kernel.carried().is_file()) {
        Some(kernel) => Err(format!(
            "{} is missing: the kernels in {CARRIED} were compiled of other sources than {}, or for other cards than \
             EDM2K_CUDA_ARCHS names, and there is no nvcc to compile these; install it (scripts/install-nvcc), or build \
             without the feature `cuda`",
            kernel.carried().display(),
            kernel.source.display()
        )),
        None => Ok((kernels.iter().map(Kernel::carried).collect(), version.trim().into())),
    }
}

/// Puts fatbins where the package takes them from.
fn carry(kernels: &[Kernel], fatbins: &[PathBuf], version: &str) -> std::io::Result<()> {
    let _ = fs::remove_dir_all(CARRIED);
    fs::create_dir_all(CARRIED)?;
    fs::write(Path::new(CARRIED).join("compiler"), version)?;
    kernels.iter().zip(fatbins).try_for_each(|(kernel, fatbin)| fs::copy(fatbin, kernel.carried()).map(|_| ()))
}

/// Where nvcc is: NVCC, CUDA_HOME or CUDA_PATH, PATH, or the wheels of scripts/install-nvcc.
fn find_nvcc() -> Result<PathBuf, String> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Ok(nvcc.into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let mut bins: Vec<PathBuf> = homes.map(|home| Path::new(&home).join("bin")).collect();
    bins.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    for python in fs::read_dir("target/nvcc/lib").into_iter().flatten().flatten() {
        bins.push(python.path().join("site-packages/nvidia/cu13/bin"));
    }
    let mut places = bins.into_iter().map(|bin| bin.join("nvcc").with_extension(env::consts::EXE_EXTENSION));
    places.find(|place| place.is_file()).ok_or_else(|| {
        "the feature `cuda` needs NVIDIA's compiler, and none was found (NVCC, CUDA_HOME, CUDA_PATH, PATH, \
         target/nvcc): run scripts/install-nvcc, or build for the CPU alone, with \
         --no-default-features --features cli"
            .into()
    })
}

fn output(nvcc: &Path, arguments: &[String]) -> Result<String, String> {
    let output = Command::new(nvcc).args(arguments).output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let [out, err] = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    let command = || format!("{} {}", nvcc.display(), arguments.join(" "));
    if output.status.success() { Ok(out) } else { Err(format!("{}\n{out}{err}", command())) }
}

/// Architectures as numbers, in order.
fn architectures() -> Result<BTreeSet<u32>, String> {
    let list = env::var("EDM2K_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let number = |word: &str| word.trim().parse().ok().filter(|&arch: &u32| arch >= 80);
    let wrong = || format!("EDM2K_CUDA_ARCHS is '{list}', expected numbers from 80 on, e.g. {ARCHS}");
    list.split(',').map(number).collect::<Option<_>>().ok_or_else(wrong)
}

/// Compiles what has not been compiled yet. Returns where the fatbins are, and the version of the compiler.
fn compile(
    kernels: &[Kernel],
    lines: Option<&str>,
    structs: &Path,
    nvcc: &Path,
    out: &Path,
) -> Result<(Vec<PathBuf>, String), String> {
    let asserted = structs.with_extension("ptx").display().to_string();
    let flags = ["-std=c++17", "-x", "cu", "-ptx", "-o"].map(String::from);
    output(nvcc, &[&flags[..], &[asserted, structs.display().to_string()]].concat())?;
    let said = output(nvcc, &["--version".into()])?;
    let version = said.split(", V").nth(1).and_then(|rest| rest.split_whitespace().next());
    let version = version.ok_or_else(|| format!("{} --version says: {said}", nvcc.display()))?;
    let kept = out.ancestors().nth(4).ok_or("OUT_DIR is not below a target directory")?.join("fatbins");
    fs::create_dir_all(&kept).map_err(|e| format!("{}: {e}", kept.display()))?;
    let fatbin = |Kernel { name, flags, files, .. }: &Kernel| {
        let mut hasher = DefaultHasher::new();
        (version, env::var_os("NVCC_CCBIN"), lines, flags, files).hash(&mut hasher);
        kept.join(format!("{name}-{:016x}", hasher.finish()))
    };
    let fatbins: Vec<PathBuf> = kernels.iter().map(fatbin).collect();

    // The largest sources come first, so that none is left alone at the end.
    let mut stale: Vec<_> = kernels.iter().zip(&fatbins).filter(|(_, fatbin)| !fatbin.exists()).collect();
    stale.sort_by_key(|(kernel, _)| fs::metadata(&kernel.source).map_or(0, |m| m.len()));
    let processes: usize = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let threads = processes.checked_div(stale.len()).unwrap_or(1).max(1);
    let (queue, errors) = (Mutex::new(stale), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..processes {
            scope.spawn(|| {
                while let Some((kernel, fatbin)) = queue.lock().ok().and_then(|mut queue| queue.pop()) {
                    let partial = out.join(format!("{}.partial", kernel.name));
                    let mut arguments = kernel.flags.clone();
                    arguments.extend(lines.map(String::from));
                    arguments.push(format!("--threads={threads}"));
                    arguments.push("-o".into());
                    arguments.extend([&partial, &kernel.source].map(|path| path.display().to_string()));
                    let moved = |_| fs::rename(&partial, fatbin).map_err(|e| format!("{}: {e}", fatbin.display()));
                    if let (Err(e), Ok(mut errors)) = (output(nvcc, &arguments).and_then(moved), errors.lock()) {
                        errors.push(e);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap_or_default();
    if !errors.is_empty() {
        return Err(errors.join("\n\n"));
    }
    Ok((fatbins, version.into()))
}

/// Writes `fatbins.rs` to OUT_DIR: the fatbins, for which architectures, and by which compiler. `structs` is what asserts the
/// layout of the structs that host and device share.
pub fn build(structs: &Path) -> Result<(), String> {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "EDM2K_CUDA_ARCHS", "EDM2K_CARRY_KERNELS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=kernels");
    let archs = architectures()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let kernels = kernels(&archs)?;
    let (made, version) = match find_nvcc() {
        Ok(nvcc) => compile(&kernels, (archs.len() == 1).then_some(LINES), structs, &nvcc, &out)?,
        Err(_) if Path::new(CARRIED).is_dir() => carried(&kernels)?,
        Err(none) => return Err(none),
    };
    if env::var_os("EDM2K_CARRY_KERNELS").is_some() {
        carry(&kernels, &made, &version).map_err(|e| format!("{CARRIED}: {e}"))?;
    }

    let mut fatbins = Vec::new();
    for (kernel, made) in kernels.iter().zip(&made) {
        let copy = out.join(format!("{}.fatbin", kernel.name));
        fs::copy(made, &copy).map_err(|e| format!("{}: {e}", copy.display()))?;
        fatbins.push(format!("({:?}, fatbin!({copy:?}))", kernel.name));
    }
    let archs: Vec<_> = archs.iter().map(u32::to_string).collect();
    let code = format!(
        "const COMPILER: &str = {version:?};\nconst ARCHS: &[u32] = &[{}];\n\
         static FATBINS: &[(&str, &Fatbin<[u8]>)] = &[{}];\n",
        archs.join(", "),
        fatbins.join(", ")
    );
    fs::write(out.join("fatbins.rs"), code).map_err(|e| format!("{}: {e}", out.display()))
}
