//! What runtimes keep of an attachment's result until its DEL: on a node that died, of sandboxes that nobody will ever delete.
//!
//! A file for each attachment, `results/NETWORK-CONTAINER-IFNAME`, with the whole configuration in it (kind `cniCacheV1` of the
//! specification's reference library).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::install::{files, names_our_plugin};

/// Files of attachments to networks whose configuration has our plugin in its list. None where there is no folder.
pub(crate) fn results_of_ours(cache_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = files(&cache_dir.join("results"))?;
    found.retain(|path| path.is_file() && fs::read(path).is_ok_and(|text| is_of_ours(&text)));
    Ok(found)
}

fn is_of_ours(text: &[u8]) -> bool {
    let Ok(cached) = serde_json::from_slice::<Value>(text) else { return false };
    let config = cached["config"].as_str().and_then(|text| STANDARD.decode(text).ok());
    cached["kind"] == "cniCacheV1" && config.is_some_and(|config| names_our_plugin(&config))
}
