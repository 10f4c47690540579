//! A certificate authority for one run: every node gets a certificate that names it.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// Signs node certificates; its key lives in memory only.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    /// Makes a new authority.
    ///
    /// # Errors
    /// No key could be made.
    pub fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, format!("Holdfast {name}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Writes `ca.pem`, `node.pem` and `node.key` for `node` into `dir`.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn issue(&self, node: &str, dir: &Path) -> Result<()> {
        self.issue_for(node, &[], dir)
    }

    /// The same for one that is known by more names and addresses.
    ///
    /// # Errors
    /// As for [`Self::issue`].
    pub fn issue_for(&self, node: &str, more: &[&str], dir: &Path) -> Result<()> {
        let key = KeyPair::generate()?;
        let names = std::iter::once(&node).chain(more).map(|name| (*name).to_owned());
        let mut params = CertificateParams::new(names.collect::<Vec<_>>())?;
        params.distinguished_name.push(DnType::CommonName, node);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let certificate = params.signed_by(&key, &self.issuer)?;
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        fs::write(dir.join("ca.pem"), &self.pem)?;
        fs::write(dir.join("node.pem"), certificate.pem())?;
        let mut key_file =
            fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(dir.join("node.key"))?;
        std::io::Write::write_all(&mut key_file, key.serialize_pem().as_bytes())?;
        Ok(())
    }
}
