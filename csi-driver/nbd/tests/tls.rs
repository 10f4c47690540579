//! Mutual TLS by STARTTLS.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::Arc;

use bytes::Bytes;
use common::{BLOCK, OneVolume, call};
use holdfast_io::BlockOp;
use holdfast_nbd::{
    Client, ClientOptions, ClientTls, ConnectError, PeerIdentity, ServeError, Server, ServerTls, TlsIdentity,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::task::JoinHandle;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn mk_authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn mk_identity(authority: &Authority, name: &str) -> TlsIdentity {
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, authority).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    TlsIdentity::new(vec![authority.der().clone()], vec![certificate.der().clone()], key).unwrap()
}

fn connect(
    volume: &Arc<OneVolume>,
    server: Option<(&TlsIdentity, bool)>,
    client: Option<ClientTls>,
) -> (impl Future<Output = Result<Client, ConnectError>> + use<>, JoinHandle<Result<(), ServeError>>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let mut serving = Server::new(volume.clone());
    if let Some((identity, required)) = server {
        serving = serving.with_tls(ServerTls { config: identity.server_config().unwrap(), required });
    }
    let served = tokio::spawn(async move { serving.serve_connection(far).await });
    let options = ClientOptions { tls: client, ..ClientOptions::new("vol") };
    (Client::connect(near, options), served)
}

#[tokio::test]
async fn both_sides_prove_who_they_are_and_data_flows() {
    let volume = OneVolume::new(4 << 20);
    let authority = mk_authority();
    let (node_a, node_b) = (mk_identity(&authority, "node-a"), mk_identity(&authority, "node-b"));
    let (connecting, served) =
        connect(&volume, Some((&node_b, true)), Some(node_a.client("node-b").unwrap()));
    let client = connecting.await.unwrap();
    assert_eq!(*volume.peers.lock().unwrap(), [PeerIdentity::Named(vec!["node-a".into()])]);
    assert!(volume.peers.lock().unwrap()[0].is_named("node-a"));

    let data = Bytes::from(vec![3; 256 * BLOCK]);
    call(&client, BlockOp::Write { offset: 0, data: data.clone(), fua: false }).await.unwrap();
    assert_eq!(call(&client, BlockOp::Read { offset: 0, len: 256 * BLOCK as u32 }).await.unwrap(), data);
    drop(client);
    served.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_that_requires_tls_gives_nothing_without() {
    let volume = OneVolume::new(4 << 20);
    let authority = mk_authority();
    let (connecting, _) = connect(&volume, Some((&mk_identity(&authority, "node-b"), true)), None);
    let error = connecting.await.unwrap_err();
    assert!(matches!(error, ConnectError::TlsRequired(_)), "{error}");
    assert!(volume.peers.lock().unwrap().is_empty(), "the provider was not even asked");
}

#[tokio::test]
async fn a_client_that_wants_tls_does_not_go_on_without() {
    let volume = OneVolume::new(4 << 20);
    let node_a = mk_identity(&mk_authority(), "node-a");
    let (connecting, _) = connect(&volume, None, Some(node_a.client("node-b").unwrap()));
    let error = connecting.await.unwrap_err();
    assert!(error.to_string().contains("refused STARTTLS"), "{error}");
    assert!(volume.peers.lock().unwrap().is_empty());
}

#[tokio::test]
async fn strangers_are_refused_in_both_directions() {
    let authority = mk_authority();
    let node_b = mk_identity(&authority, "node-b");
    let stranger = mk_identity(&mk_authority(), "node-a");
    let node_a = mk_identity(&authority, "node-a");

    let volume = OneVolume::new(4 << 20);
    let (connecting, served) =
        connect(&volume, Some((&node_b, true)), Some(stranger.client("node-b").unwrap()));
    assert!(connecting.await.is_err(), "a server of another authority");
    assert!(served.await.unwrap().is_err());

    // It trusts the server, but brings a certificate of its own authority.
    let key = KeyPair::generate().unwrap();
    let forged = CertificateParams::new(vec!["node-a".to_owned()]).unwrap().self_signed(&key).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let forger = TlsIdentity::new(vec![authority.der().clone()], vec![forged.der().clone()], key).unwrap();
    let (connecting, served) =
        connect(&volume, Some((&node_b, true)), Some(forger.client("node-b").unwrap()));
    assert!(connecting.await.is_err(), "a client with a forged certificate");
    assert!(served.await.unwrap().is_err());

    let (connecting, _) = connect(&volume, Some((&node_b, true)), Some(node_a.client("node-c").unwrap()));
    assert!(connecting.await.is_err(), "another node in node-c's place");
    assert!(volume.peers.lock().unwrap().is_empty());
}

#[test]
fn the_identity_is_read_from_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let missing = TlsIdentity::load(dir.path()).unwrap_err();
    assert!(missing.to_string().contains("node.key"), "{missing}");
    let authority = mk_authority();
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["node-a".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    std::fs::write(dir.path().join("ca.pem"), authority.pem()).unwrap();
    std::fs::write(dir.path().join("node.pem"), certificate.pem()).unwrap();
    std::fs::write(dir.path().join("node.key"), key.serialize_pem()).unwrap();
    let identity = TlsIdentity::load(dir.path()).unwrap();
    identity.server_config().unwrap();
    assert!(identity.client("not a name").is_err());
    assert_eq!(holdfast_nbd::peer_names(certificate.der()), ["node-a"]);
}
