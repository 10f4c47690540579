//! The authorities of another signer, such as cert-manager: what of them everybody is to trust. Pure.
//!
//! Promised: an authority is trusted only if the Secret that the signer keeps named it, and one that it does not name any more is
//! trusted no longer than what it signed lives. Who could break it: whoever may write that Secret or the ConfigMap; a Secret that is
//! empty, cut off or holds a leaf, which as an anchor would be trusted for whatever it signs; a crash, or a twin, between two writes,
//! which is why all of it is in the one ConfigMap.

use k8s_openapi::api::core::v1::ConfigMap;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::BUNDLE_KEY;

/// Where cert-manager, and Kubernetes' own Secrets of type tls, have the authority.
pub(super) const SECRET_KEY: &str = "ca.crt";
/// Annotation: since when (seconds since 1970) the Secret has named the authorities that it names.
const SINCE: &str = "storage.holdfast.dev/authorities-since";
/// Authorities that are trusted at the same time; of more, those that were replaced first are not any longer.
const AUTHORITIES_MAX: usize = 8;
const END: &str = "-----END CERTIFICATE-----";

/// What the ConfigMap says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Adopted {
    /// The certificates; first those that the Secret names.
    pub bundle: String,
    /// Since when it has named them; unknown where the built-in issuer or a person wrote the ConfigMap.
    pub since_s: Option<i64>,
}

impl Adopted {
    /// What is in a ConfigMap.
    pub(super) fn of(map: &ConfigMap) -> Self {
        let bundle = map.data.as_ref().and_then(|data| data.get(BUNDLE_KEY)).cloned().unwrap_or_default();
        let since = map.metadata.annotations.as_ref().and_then(|annotations| annotations.get(SINCE));
        Self { bundle, since_s: since.and_then(|since| since.parse().ok()) }
    }

    /// Replaces what is in a ConfigMap, and keeps what others wrote beside it.
    pub(super) fn write_to(&self, map: &mut ConfigMap) {
        map.data = Some([(BUNDLE_KEY.to_owned(), self.bundle.clone())].into());
        let annotations = map.metadata.annotations.get_or_insert_default();
        match self.since_s {
            Some(since_s) => drop(annotations.insert(SINCE.to_owned(), since_s.to_string())),
            None => drop(annotations.remove(SINCE)),
        }
    }
}

/// What is to be trusted once the Secret says `named`: those, and the ones of `before` for `kept_s` from the change on.
///
/// # Errors
/// A sentence: it names none, or something that is no authority. What was published stays.
pub(super) fn adopt(named: &str, before: &Adopted, kept_s: i64, now_s: i64) -> Result<Adopted, String> {
    let named = blocks(named);
    if named.is_empty() || named.len() > AUTHORITIES_MAX {
        return Err(format!(
            "{SECRET_KEY} holds {} certificates; 1 to {AUTHORITIES_MAX} are expected",
            named.len()
        ));
    }
    for pem in &named {
        let authority = read(pem)?;
        if !authority.may_sign {
            return Err(format!("{SECRET_KEY} holds a certificate that is no authority"));
        }
        if authority.ends_s <= now_s {
            return Err(format!("an authority of {SECRET_KEY} has ended"));
        }
    }
    let published = blocks(&before.bundle);
    let is_as_before = published.starts_with(&named);
    let since_s = before.since_s.filter(|_| is_as_before).unwrap_or(now_s);
    let lives = |pem: &String| read(pem).is_ok_and(|authority| authority.ends_s > now_s);
    let is_over = now_s >= since_s.saturating_add(kept_s);
    let others = published.into_iter().filter(|pem| !is_over && !named.contains(pem) && lives(pem));
    let bundle = named.iter().cloned().chain(others).take(AUTHORITIES_MAX).collect();
    Ok(Adopted { bundle, since_s: Some(since_s) })
}

/// Each certificate of a PEM text, alone.
fn blocks(pem: &str) -> Vec<String> {
    let ended = pem.split_inclusive(END).filter(|text| text.ends_with(END));
    ended.map(|text| format!("{}\n", text.trim())).collect()
}

struct Read {
    may_sign: bool,
    ends_s: i64,
}

fn read(pem: &str) -> Result<Read, String> {
    let unreadable = |reason: String| format!("a certificate cannot be read: {reason}");
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| unreadable(e.to_string()))?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).map_err(|e| unreadable(e.to_string()))?;
    Ok(Read { may_sign: parsed.is_ca(), ends_s: parsed.validity().not_after.timestamp() })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    const NOW: i64 = 1_800_000_000;
    const KEPT: i64 = 1000;

    fn mk_pem(is_ca: IsCa, ends_s: i64) -> String {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = is_ca;
        params.not_before = time::OffsetDateTime::from_unix_timestamp(NOW - 1_000_000).unwrap();
        params.not_after = time::OffsetDateTime::from_unix_timestamp(ends_s).unwrap();
        blocks(&params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()).concat()
    }

    fn mk_authority(ends_s: i64) -> String {
        mk_pem(IsCa::Ca(BasicConstraints::Unconstrained), ends_s)
    }

    /// As it is read back from the ConfigMap.
    fn stored(adopted: &Adopted) -> Adopted {
        let mut map = ConfigMap::default();
        adopted.write_to(&mut map);
        Adopted::of(&map)
    }

    #[test]
    fn one_that_was_replaced_is_trusted_until_what_it_signed_has_ended() {
        let (first, second) = (mk_authority(NOW + 1_000_000), mk_authority(NOW + 1_000_000));
        let one = adopt(&first, &Adopted::default(), KEPT, NOW).unwrap();
        assert_eq!((one.bundle.as_str(), one.since_s), (first.as_str(), Some(NOW)));
        assert_eq!(stored(&one), one);
        assert_eq!(adopt(&first, &one, KEPT, NOW + 500).unwrap(), one, "nothing changed");

        let both = adopt(&second, &one, KEPT, NOW + 5000).unwrap();
        assert_eq!(both.bundle, format!("{second}{first}"));
        assert_eq!(adopt(&second, &stored(&both), KEPT, NOW + 5999).unwrap(), both);
        let rest = adopt(&second, &stored(&both), KEPT, NOW + 6000).unwrap();
        assert_eq!((rest.bundle.as_str(), rest.since_s), (second.as_str(), Some(NOW + 5000)));
        // Back to the first one while both are trusted.
        let back = adopt(&first, &both, KEPT, NOW + 5500).unwrap();
        assert_eq!((back.bundle, back.since_s), (format!("{first}{second}"), Some(NOW + 5500)));
    }

    #[test]
    fn what_the_built_in_issuer_published_is_an_authority_of_before() {
        let (own, theirs) = (mk_authority(NOW + 1_000_000), mk_authority(NOW + 1_000_000));
        let before = Adopted { bundle: own.clone(), since_s: None };
        let both = adopt(&theirs, &before, KEPT, NOW).unwrap();
        assert_eq!(both.bundle, format!("{theirs}{own}"));
        assert_eq!(adopt(&theirs, &both, KEPT, NOW + KEPT).unwrap().bundle, theirs);
        let ended = adopt(&theirs, &Adopted { bundle: mk_authority(NOW - 1), since_s: None }, KEPT, NOW);
        assert_eq!(ended.unwrap().bundle, theirs);
    }

    #[test]
    fn what_is_no_living_authority_is_never_published() {
        let authority = mk_authority(NOW + 1_000_000);
        let leaf = mk_pem(IsCa::ExplicitNoCa, NOW + 1_000_000);
        let bare = mk_pem(IsCa::NoCa, NOW + 1_000_000);
        let cut = authority.replace("-----END", "----END");
        let rubbish = format!("-----BEGIN CERTIFICATE-----\nAAAA\n{END}\n");
        let many = authority.repeat(AUTHORITIES_MAX + 1);
        for named in [
            String::new(),
            leaf.clone(),
            format!("{authority}{leaf}"),
            bare,
            cut,
            rubbish,
            mk_authority(NOW),
            many,
        ] {
            assert!(adopt(&named, &Adopted::default(), KEPT, NOW).is_err(), "{named}");
        }
    }

    #[test]
    fn of_many_changes_the_newest_are_trusted() {
        let mut adopted = Adopted::default();
        let all: Vec<String> = (0..12).map(|_| mk_authority(NOW + 1_000_000)).collect();
        for (number, authority) in (0..).zip(&all) {
            adopted = adopt(authority, &adopted, KEPT, NOW + number).unwrap();
        }
        let newest: String = all.iter().rev().take(AUTHORITIES_MAX).cloned().collect();
        assert_eq!(adopted.bundle, newest);
    }
}
