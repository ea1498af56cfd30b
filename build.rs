//! Compiles the kernels: with nvcc (feature `cuda`), and for the emulator (feature `emulator`).

#[cfg(feature = "cuda")]
#[path = "kernels/build.rs"]
mod cuda;
#[cfg(feature = "emulator")]
#[path = "kernels/emulator/build.rs"]
mod emulator;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let results: &[Result<(), String>] = &[
        #[cfg(feature = "cuda")]
        cuda::build(),
        #[cfg(feature = "emulator")]
        emulator::build(),
    ];
    if let Some(Err(message)) = results.iter().find(|result| result.is_err()) {
        eprintln!("{message}");
        std::process::exit(1);
    }
}
