//! Writes the definitions of our kinds into a folder: `cargo run --example crds -- manifests/crds/storage`.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: crds FOLDER")?;
    for crd in holdfast_service::kubernetes::crds() {
        let path = folder.join(format!("{}.yaml", crd.spec.names.plural));
        std::fs::write(&path, serde_norway::to_string(&crd)?)?;
        println!("{}", path.display());
    }
    Ok(())
}
