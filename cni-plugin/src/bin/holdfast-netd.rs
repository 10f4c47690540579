//! holdfast-csi.
fn main() {}
