//! Makes the Rust side of the kernels' structs, and compiles the kernels: with nvcc (feature `cuda`), and for the
//! emulator (feature `emulator`).

#[path = "kernels/structs.rs"]
mod structs;

#[cfg(feature = "cuda")]
#[path = "kernels/build.rs"]
mod cuda;
#[cfg(feature = "emulator")]
#[path = "kernels/emulator/build.rs"]
mod emulator;

fn build() -> Result<(), String> {
    println!("cargo:rerun-if-changed=build.rs");
    let _asserted = structs::build()?;
    #[cfg(feature = "cuda")]
    cuda::build(&_asserted)?;
    #[cfg(feature = "emulator")]
    emulator::build(&_asserted)?;
    Ok(())
}

fn main() {
    if let Err(message) = build() {
        eprintln!("{message}");
        std::process::exit(1);
    }
}
