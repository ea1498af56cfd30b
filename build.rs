//! Compiles the kernels: for the emulator, with the feature of that name.

#[cfg(feature = "emulator")]
#[path = "kernels/emulator/build.rs"]
mod emulator;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "emulator")]
    if let Err(message) = emulator::build() {
        eprintln!("{message}");
        std::process::exit(1);
    }
}
