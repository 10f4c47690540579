//! Messages and services on the wire: CSI, storage control and registry, node agent.

/// Storage control services: replicas, pools, the data process and the registry.
pub mod storage {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("holdfast.storage.v1");
}

/// The node agent's service for the CNI plugin and the command line.
pub mod agent {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("holdfast.agent.v1");
}

/// The Container Storage Interface, version 1.13.
pub mod csi {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("csi.v1");
}

impl std::fmt::Debug for storage::AttachRequest {
    /// All but the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let storage::AttachRequest { volume_id, attachment, key } = self;
        f.debug_struct("AttachRequest")
            .field("volume_id", volume_id)
            .field("attachment", attachment)
            .field("key", if key.is_empty() { &"none" } else { &"not shown" })
            .finish()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_key_is_not_shown() {
        let request = super::storage::AttachRequest { key: vec![201; 64], ..Default::default() };
        assert!(!format!("{request:?}").contains("201"));
    }
}
