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
