//! Compiles the protocol files with protox, so that no protoc is needed.

use std::error::Error;

const FILES: &[&str] = &["proto/storage.proto", "proto/agent.proto", "proto/csi.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["proto"])?;
    // It carries a key: src/lib.rs shows it without.
    tonic_prost_build::configure()
        .skip_debug([".holdfast.storage.v1.AttachRequest"])
        .compile_fds(descriptors)?;
    Ok(())
}
