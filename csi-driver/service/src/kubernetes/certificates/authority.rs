//! The authorities: one signs, another may be about to, and those of before are still trusted.
//!
//! ```text
//!            made          a third of its life before the end      + overlap            + overlap, life of a certificate
//!  current ───┼──────────────────────────┼─────────────────────────────┼  previous ──────────────┼ gone
//!  next       │                          └ made, trusted by all ───────┴  current ───────────────...
//! ```
//!
//! Invariant: whoever read the bundle within the last overlap trusts every certificate that is in use. Each step is one
//! compare-and-swap of the Secret, so a crash between steps leaves a state from which the next step goes on. The key of an
//! authority goes with its last signature: of one that was replaced only the certificate is kept.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::judge::Granted;
use super::seconds;

/// Certificates begin so long before they are made, for clocks that are behind; those of short life a tenth of that.
const BACKDATE_S_MAX: i64 = 300;
const CURRENT: (&str, &str) = ("current.pem", "current.key");
const NEXT: (&str, &str) = ("next.pem", "next.key");
const PREVIOUS: &str = "previous.pem";

/// How long things live.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lives {
    pub certificate: Duration,
    pub authority: Duration,
    pub overlap: Duration,
}

/// An authority that can sign.
struct Authority {
    pem: String,
    key: Zeroizing<String>,
    ends_s: i64,
    made_s: i64,
}

/// All of them, as they are in the Secret.
pub(super) struct Authorities {
    current: Authority,
    next: Option<Authority>,
    /// Certificates, newest first.
    previous: Vec<Trusted>,
}

/// A certificate that is still trusted.
struct Trusted {
    pem: String,
    ends_s: i64,
}

impl Authorities {
    /// A first authority.
    pub(super) fn new(lives: &Lives, now_s: i64) -> Result<Self, String> {
        Ok(Self { current: Authority::new(lives, now_s)?, next: None, previous: Vec::new() })
    }

    /// From the Secret's data.
    pub(super) fn from_data(data: &BTreeMap<String, ByteString>) -> Result<Self, String> {
        let text = |key: &str| {
            data.get(key)
                .map(|bytes| String::from_utf8(bytes.0.clone()).map_err(|_| format!("{key} is no text")))
                .transpose()
        };
        let authority = |(pem, key): (&str, &str)| match (text(pem)?, text(key)?) {
            (Some(pem), Some(key)) => Authority::read(pem, Zeroizing::new(key)).map(Some),
            (None, None) => Ok(None),
            _ => Err(format!("of {pem} and {key} there is only one")),
        };
        let previous = text(PREVIOUS)?.unwrap_or_default();
        Ok(Self {
            current: authority(CURRENT)?.ok_or_else(|| format!("there is no {}", CURRENT.0))?,
            next: authority(NEXT)?,
            previous: trusted(&previous)?,
        })
    }

    /// For the Secret.
    pub(super) fn to_data(&self) -> BTreeMap<String, ByteString> {
        let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
        let mut data = BTreeMap::new();
        for ((pem, key), authority) in [(CURRENT, Some(&self.current)), (NEXT, self.next.as_ref())] {
            if let Some(authority) = authority {
                data.insert(pem.to_owned(), bytes(&authority.pem));
                data.insert(key.to_owned(), bytes(&authority.key));
            }
        }
        let previous: String = self.previous.iter().map(|old| old.pem.as_str()).collect();
        if !previous.is_empty() {
            data.insert(PREVIOUS.to_owned(), bytes(&previous));
        }
        data
    }

    /// The certificates that everybody trusts.
    pub(super) fn bundle(&self) -> String {
        let next = self.next.iter().map(|next| next.pem.as_str());
        let previous = self.previous.iter().map(|old| old.pem.as_str());
        std::iter::once(self.current.pem.as_str()).chain(next).chain(previous).collect()
    }

    /// Does the step that is due, and says which; one at a time. `None`: none is.
    pub(super) fn step(&mut self, lives: &Lives, now_s: i64) -> Result<Option<&'static str>, String> {
        let (overlap_s, certificate_s) = (seconds(lives.overlap), seconds(lives.certificate));
        if let Some(next) = self.next.take_if(|next| now_s >= next.made_s + overlap_s) {
            let old = std::mem::replace(&mut self.current, next);
            self.previous.insert(0, Trusted { pem: old.pem, ends_s: old.ends_s });
            return Ok(Some("the next authority signs from now on"));
        }
        // What the one before signed last ends then; an issuer that was paused may have signed with it an overlap too late.
        let is_needed_s = self.current.made_s + 2 * overlap_s + certificate_s;
        let before = self.previous.len();
        self.previous.retain(|old| now_s < old.ends_s && now_s < is_needed_s);
        if self.previous.len() != before {
            return Ok(Some("an authority of before is not trusted any more"));
        }
        if self.next.is_none() && now_s >= self.current.ends_s - seconds(lives.authority) / 3 {
            self.next = Some(Authority::new(lives, now_s)?);
            return Ok(Some("the next authority is made; it signs after the overlap"));
        }
        Ok(None)
    }

    /// A certificate, as PEM.
    pub(super) fn sign(&self, granted: &Granted, now_s: i64) -> Result<String, String> {
        let mut params = CertificateParams::new(vec![granted.name.clone()]).map_err(|e| e.to_string())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, granted.name.clone());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = time(now_s - backdate_s(granted.life_s))?;
        params.not_after = time((now_s + granted.life_s).min(self.current.ends_s))?;
        let key = KeyPair::from_pem(&self.current.key).map_err(|e| e.to_string())?;
        let issuer = Issuer::from_ca_cert_pem(&self.current.pem, key).map_err(|e| e.to_string())?;
        Ok(params.signed_by(&granted.key, &issuer).map_err(|e| e.to_string())?.pem())
    }
}

impl Authority {
    fn new(lives: &Lives, now_s: i64) -> Result<Self, String> {
        let key = KeyPair::generate().map_err(|e| e.to_string())?;
        let mut params = CertificateParams::new(Vec::new()).map_err(|e| e.to_string())?;
        params.distinguished_name = DistinguishedName::new();
        // Verifiers find an issuer by its name: two authorities never share one.
        let id: String = key.der_bytes().iter().rev().take(8).map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name.push(DnType::CommonName, format!("Holdfast authority {id}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let life_s = seconds(lives.authority);
        params.not_before = time(now_s - backdate_s(life_s))?;
        let ends_s = now_s + life_s;
        params.not_after = time(ends_s)?;
        let pem = params.self_signed(&key).map_err(|e| e.to_string())?.pem();
        Ok(Self { pem, key: Zeroizing::new(key.serialize_pem()), ends_s, made_s: now_s })
    }

    fn read(pem: String, key: Zeroizing<String>) -> Result<Self, String> {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| e.to_string())?;
        let (ends_s, begins_s) = validity(&der)?;
        // The inverse of how it was made: with its life, a tenth of it is between the two, or the most.
        let between_s = ends_s - begins_s;
        let backdated_s = (between_s / 11).min(BACKDATE_S_MAX);
        Ok(Self { pem, key, ends_s, made_s: begins_s + backdated_s })
    }
}

fn trusted(pem: &str) -> Result<Vec<Trusted>, String> {
    const END: &str = "-----END CERTIFICATE-----";
    let mut found = Vec::new();
    for text in pem.split_inclusive(END).filter(|text| text.contains(END)) {
        let text = text.trim();
        let der = CertificateDer::from_pem_slice(text.as_bytes()).map_err(|e| e.to_string())?;
        found.push(Trusted { pem: format!("{text}\n"), ends_s: validity(&der)?.0 });
    }
    Ok(found)
}

/// When a certificate ends and begins.
fn validity(der: &CertificateDer<'_>) -> Result<(i64, i64), String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|e| e.to_string())?;
    let validity = parsed.validity();
    Ok((validity.not_after.timestamp(), validity.not_before.timestamp()))
}

fn backdate_s(life_s: i64) -> i64 {
    (life_s / 10).min(BACKDATE_S_MAX)
}

fn time(seconds: i64) -> Result<OffsetDateTime, String> {
    OffsetDateTime::from_unix_timestamp(seconds).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use rcgen::CertificateSigningRequestParams;
    use rustls::pki_types::UnixTime;

    use super::*;
    use crate::tls::TlsIdentity;

    const DAY: i64 = 86_400;
    const LIVES: Lives = Lives {
        certificate: Duration::from_secs(30 * 86_400),
        authority: Duration::from_secs(365 * 86_400),
        overlap: Duration::from_secs(86_400),
    };
    const START: i64 = 1_800_000_000;

    /// A certificate that is signed now, with its key.
    fn mk_leaf(authorities: &Authorities, now_s: i64) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let request =
            CertificateParams::new(vec!["node-a".to_owned()]).unwrap().serialize_request(&key).unwrap();
        let key_of = CertificateSigningRequestParams::from_pem(&request.pem().unwrap()).unwrap().public_key;
        let granted = Granted { name: "node-a".to_owned(), key: key_of, life_s: seconds(LIVES.certificate) };
        (authorities.sign(&granted, now_s).unwrap(), key.serialize_pem())
    }

    fn is_trusted(bundle: &str, leaf: &(String, String), now_s: i64) -> bool {
        let identity =
            TlsIdentity::from_pem(bundle.as_bytes(), leaf.0.as_bytes(), leaf.1.as_bytes()).unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now_s.unsigned_abs()));
        identity.life_of("node-a", now).is_ok()
    }

    /// Three years day by day: each day's certificate is trusted until its end by whoever read the bundle a day before.
    #[test]
    fn every_certificate_is_trusted_by_everybody_for_its_whole_life() {
        let mut authorities = Authorities::new(&LIVES, START).unwrap();
        let (mut bundles, mut leaves, mut promoted) = (Vec::new(), Vec::new(), 0);
        for day in 0..3 * 365 {
            let now = START + day * DAY;
            while let Some(step) = authorities.step(&LIVES, now).unwrap() {
                promoted += i32::from(step.contains("signs from now on"));
                // As after a crash: all that counts is what is in the Secret.
                authorities = Authorities::from_data(&authorities.to_data()).unwrap();
            }
            bundles.push(authorities.bundle());
            if day % 10 == 0 {
                leaves.push((day, mk_leaf(&authorities, now)));
            }
            for (made, leaf) in leaves.iter().filter(|(made, _)| (made + 1..made + 30).contains(&day)) {
                let stale = bundles.iter().rev().nth(1).unwrap();
                assert!(is_trusted(stale, leaf, now), "of day {made}, on day {day}");
            }
            assert!(authorities.bundle().matches("BEGIN").count() <= 3);
        }
        assert!(promoted >= 3, "{promoted}");
    }

    #[test]
    fn an_authority_that_was_replaced_is_forgotten_with_its_key() {
        let mut authorities = Authorities::new(&LIVES, START).unwrap();
        let (first, key) = (authorities.current.pem.clone(), authorities.current.key.clone());
        let due = START + 365 * DAY - 365 * DAY / 3;
        assert!(authorities.step(&LIVES, due - 1).unwrap().is_none());
        assert!(authorities.step(&LIVES, due).unwrap().unwrap().contains("is made"));
        assert!(authorities.step(&LIVES, due + DAY - 1).unwrap().is_none());
        assert!(authorities.step(&LIVES, due + DAY).unwrap().unwrap().contains("signs from now on"));
        assert!(authorities.bundle().contains(first.trim()));
        let held = format!(
            "{:?}",
            authorities.to_data().values().map(|v| String::from_utf8(v.0.clone())).collect::<Vec<_>>()
        );
        assert!(!held.contains(key.lines().nth(1).unwrap()), "the old key is still there");
        assert!(authorities.step(&LIVES, due + 32 * DAY - 1).unwrap().is_none());
        assert!(authorities.step(&LIVES, due + 32 * DAY).unwrap().unwrap().contains("not trusted"));
        assert!(!authorities.bundle().contains(first.trim()));
    }

    #[test]
    fn when_an_authority_was_made_is_read_from_it() {
        for life in [20, 65, 599, 2999, 3000, 3001, 31_536_000] {
            let lives = Lives { authority: Duration::from_secs(life), ..LIVES };
            let made = Authority::new(&lives, START).unwrap();
            let read = Authority::read(made.pem, made.key).unwrap();
            assert_eq!((read.made_s, read.ends_s), (START, START + i64::try_from(life).unwrap()), "{life}");
        }
    }

    #[test]
    fn a_certificate_never_outlives_its_authority_and_strangers_are_not_trusted() {
        let authorities = Authorities::new(&LIVES, START).unwrap();
        let late = START + 364 * DAY;
        let leaf = mk_leaf(&authorities, late);
        assert!(is_trusted(&authorities.bundle(), &leaf, late));
        assert!(!is_trusted(&authorities.bundle(), &leaf, START + 365 * DAY + 1));
        let stranger = Authorities::new(&LIVES, START).unwrap();
        assert!(!is_trusted(&stranger.bundle(), &leaf, late));
        assert!(Authorities::from_data(&BTreeMap::new()).is_err());
    }
}
