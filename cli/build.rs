//! How the binary is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() != Ok("gnu") {
        return;
    }
    // As a table the relocations of this binary are 2.2 MiB that are read at start and stay in memory, packed they are some
    // KiB. Needs glibc 2.36, which Debian 12 has.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // What the compiler's profile says runs often lies together, and what never runs is never read from the file.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,keep-text-section-prefix");
}
