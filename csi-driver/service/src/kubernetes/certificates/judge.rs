//! Whether a request may have a certificate. Pure: what the API server says of a request, and the time, in; a verdict out.
//!
//! Not checked: that the pod whose token asked still lives (the API server refuses tokens of pods that are gone), and that
//! no other certificate of the name is about (a restarted process asks again, and the old one ends by itself).

use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use rcgen::{
    CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, PublicKey,
    SanType,
};

use super::{CONTROLLER_ACCOUNT, DATA_ACCOUNT, OWN_SIGNER, USAGES};
use crate::tls::CONTROLLER_NAME;

/// A request that waited longer is refused: its holder has given up and made another one.
const AGE_S_MAX: i64 = 600;
/// Clocks of API server and issuer may differ by so much.
const SKEW_S_MAX: i64 = 300;
/// Where the API server says which node a token is bound to.
const NODE_EXTRA: &str = "authentication.kubernetes.io/node-name";

/// What may be asked for.
#[derive(Debug, Clone)]
pub(super) struct Rules<'a> {
    /// Our signer.
    pub signer: &'a str,
    /// Namespace of our accounts.
    pub namespace: &'a str,
    /// Longest life of a certificate.
    pub life_s_max: i64,
}

/// What is signed.
#[derive(Debug)]
pub(super) struct Granted {
    /// The DNS name.
    pub name: String,
    /// The holder's key.
    pub key: PublicKey,
    /// How long the certificate may live.
    pub life_s: i64,
}

/// Judges a request at the time `now_s` (seconds since 1970).
///
/// # Errors
/// A sentence for whoever asked.
pub(super) fn judge(
    request: &CertificateSigningRequest,
    rules: &Rules<'_>,
    now_s: i64,
) -> Result<Granted, String> {
    let spec = &request.spec;
    if spec.signer_name != rules.signer {
        return Err(format!("the signer {} is not served here", spec.signer_name));
    }
    let created = request.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
    let age_s = created.map_or(i64::MAX, |created| now_s.saturating_sub(created));
    if !(-SKEW_S_MAX..=AGE_S_MAX).contains(&age_s) {
        return Err(format!(
            "the request is {age_s} s old; at most {AGE_S_MAX} s are allowed: make a new one"
        ));
    }
    let may_be = name_of_maker(request, rules.namespace)?;
    let mut usages: Vec<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    usages.sort_unstable();
    let mut allowed = USAGES;
    allowed.sort_unstable();
    if usages != allowed {
        return Err(format!("the usages are {usages:?}; exactly {allowed:?} are allowed"));
    }
    let life_s = spec.expiration_seconds.map_or(rules.life_s_max, i64::from);
    if !(1..=rules.life_s_max).contains(&life_s) {
        return Err(format!("a life of {life_s} s is asked for; at most {} s are allowed", rules.life_s_max));
    }
    if rules.signer != OWN_SIGNER {
        leaves_nothing_to_the_signer(request)?;
    }
    let key = key_of(&spec.request.0, &may_be)?;
    Ok(Granted { name: may_be, key, life_s })
}

/// The built-in issuer makes certificates of what was judged alone. Another signer reads the request by itself, and more of it:
/// cert-manager makes whoever asks an authority, or lets the certificate live for years, if an annotation says so
/// (`experimental.cert-manager.io/request-is-ca`, `.../request-duration`), and chooses a life where none is asked for.
///
/// Annotations that are added after the approval are not seen here: that takes the right to change requests, which no account of
/// ours has.
fn leaves_nothing_to_the_signer(request: &CertificateSigningRequest) -> Result<(), String> {
    if let Some(key) = request.metadata.annotations.iter().flat_map(|annotations| annotations.keys()).next() {
        return Err(format!("the request has the annotation {key}, which its signer may take for a wish"));
    }
    if request.spec.expiration_seconds.is_none() {
        return Err("the request leaves its life to the signer; --tls-life-s is at least 600 here".to_owned());
    }
    Ok(())
}

/// The one name that the maker of a request may have a certificate for.
fn name_of_maker(request: &CertificateSigningRequest, namespace: &str) -> Result<String, String> {
    let spec = &request.spec;
    let user = spec.username.as_deref().unwrap_or_default();
    let account = user.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let account = match account {
        Some((of, account)) if of == namespace => account,
        _ => return Err(format!("\"{user}\" is no account of ours")),
    };
    let nodes = spec.extra.as_ref().and_then(|extra| extra.get(NODE_EXTRA));
    let node = match nodes.map(Vec::as_slice) {
        Some([node]) if !node.is_empty() => node.clone(),
        _ => return Err("the token of the request names no node; use one that is bound to a pod".to_owned()),
    };
    match account {
        CONTROLLER_ACCOUNT => Ok(CONTROLLER_NAME.to_owned()),
        // It would be taken for the controller.
        DATA_ACCOUNT if node == CONTROLLER_NAME => Err(format!("no node may be named {CONTROLLER_NAME}")),
        DATA_ACCOUNT => Ok(node),
        _ => Err(format!("the account {account} needs no certificate")),
    }
}

/// The key of a PKCS#10 request (RFC 2986) that its holder has signed and that asks for `name` alone.
fn key_of(pem: &[u8], name: &str) -> Result<PublicKey, String> {
    let text = std::str::from_utf8(pem).map_err(|_| "the request is no text".to_owned())?;
    if !is_one_plain_block(text) {
        return Err("the request is more than one plain PEM block".to_owned());
    }
    let asked = CertificateSigningRequestParams::from_pem(text)
        .map_err(|error| format!("the request cannot be read, or its signature is wrong: {error}"))?;
    let named = &asked.params.subject_alt_names;
    let is_name = |san: &SanType| matches!(san, SanType::DnsName(found) if found.as_str() == name);
    if named.len() != 1 || !named.iter().all(is_name) {
        return Err(format!("the request asks for the names {named:?}; its maker may have \"{name}\" alone"));
    }
    let subject = &asked.params.distinguished_name;
    let has_other = subject.iter().any(|(kind, value)| {
        *kind != DnType::CommonName || !matches!(value, rcgen::DnValue::Utf8String(text) if text == name)
    });
    if has_other {
        return Err(format!("the request's subject is more than \"CN={name}\""));
    }
    // None of it would be signed; but whoever asks for it is not one of ours.
    let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    if !matches!(asked.params.is_ca, IsCa::NoCa)
        || asked.params.extended_key_usages.iter().any(|usage| !usages.contains(usage))
        || asked.params.key_usages.iter().any(|usage| *usage != KeyUsagePurpose::DigitalSignature)
    {
        return Err("the request asks for more than a certificate of a TLS server and client".to_owned());
    }
    Ok(asked.public_key)
}

/// Whether every reader finds the same in it (RFC 7468, the strict form): of two blocks, or a broken one before another, a signer
/// might take the one that was not judged.
fn is_one_plain_block(text: &str) -> bool {
    let body = text.strip_prefix("-----BEGIN CERTIFICATE REQUEST-----");
    let body = body.and_then(|rest| rest.trim_end().strip_suffix("-----END CERTIFICATE REQUEST-----"));
    let is_base64 = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'\r' | b'\n');
    body.is_some_and(|body| body.trim_end().trim_end_matches('=').bytes().all(is_base64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::ByteString;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;
    use rcgen::{BasicConstraints, CertificateParams, KeyPair};

    use super::*;

    const NOW: i64 = 1_800_000_000;
    const RULES: Rules<'_> = Rules { signer: OWN_SIGNER, namespace: "holdfast-system", life_s_max: 86_400 };

    fn mk_pem(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, names.first().cloned().unwrap_or_default());
        change(&mut params);
        let request = params.serialize_request(&KeyPair::generate().unwrap()).unwrap();
        request.pem().unwrap().into_bytes()
    }

    /// As the API server has it from the data process of node-a.
    fn mk_request(change: impl FnOnce(&mut CertificateSigningRequest)) -> CertificateSigningRequest {
        let mut request = CertificateSigningRequest::default();
        request.metadata.creation_timestamp = Some(Time(Timestamp::from_second(NOW - 2).unwrap()));
        request.spec.signer_name = OWN_SIGNER.to_owned();
        request.spec.request = ByteString(mk_pem(&["node-a"], |_| {}));
        request.spec.usages = Some(USAGES.map(str::to_owned).to_vec());
        request.spec.expiration_seconds = Some(3600);
        request.spec.username = Some("system:serviceaccount:holdfast-system:holdfast-data".to_owned());
        request.spec.extra = Some(bound_to(&["node-a"]));
        change(&mut request);
        request
    }

    fn bound_to(nodes: &[&str]) -> BTreeMap<String, Vec<String>> {
        [(NODE_EXTRA.to_owned(), nodes.iter().map(|&node| node.to_owned()).collect())].into()
    }

    fn refused(request: &CertificateSigningRequest) -> String {
        judge(request, &RULES, NOW).unwrap_err()
    }

    #[test]
    fn a_node_and_the_controller_get_what_they_may_have() {
        let granted = judge(&mk_request(|_| {}), &RULES, NOW).unwrap();
        assert_eq!((granted.name.as_str(), granted.life_s), ("node-a", 3600));
        let controller = mk_request(|request| {
            request.spec.username =
                Some("system:serviceaccount:holdfast-system:holdfast-controller".to_owned());
            request.spec.request = ByteString(mk_pem(&[CONTROLLER_NAME], |_| {}));
            request.spec.expiration_seconds = None;
        });
        let granted = judge(&controller, &RULES, NOW).unwrap();
        assert_eq!((granted.name.as_str(), granted.life_s), (CONTROLLER_NAME, RULES.life_s_max));
    }

    #[test]
    fn nobody_gets_the_name_of_another() {
        // Also with bytes that node-b itself has signed, caught and replayed.
        for names in [&["node-b"][..], &["node-a", "node-b"], &["*.node-a"], &[CONTROLLER_NAME], &[]] {
            let request = mk_request(|request| request.spec.request = ByteString(mk_pem(names, |_| {})));
            assert!(
                refused(&request).contains("may have \"node-a\" alone"),
                "{names:?}: {}",
                refused(&request)
            );
        }
        let by_address = mk_request(|request| {
            request.spec.request = ByteString(mk_pem(&["node-a"], |params| {
                params.subject_alt_names.push(SanType::IpAddress([10, 0, 0, 1].into()));
            }));
        });
        assert!(refused(&by_address).contains("may have \"node-a\" alone"));
        let subject = mk_request(|request| {
            request.spec.request = ByteString(mk_pem(&["node-a"], |params| {
                params.distinguished_name.push(DnType::OrganizationName, "system:masters");
            }));
        });
        assert!(refused(&subject).contains("subject"), "{}", refused(&subject));
        // A node with the controller's name would be taken for it.
        let taken = mk_request(|request| {
            request.spec.extra = Some(bound_to(&[CONTROLLER_NAME]));
            request.spec.request = ByteString(mk_pem(&[CONTROLLER_NAME], |_| {}));
        });
        assert!(refused(&taken).contains("no node may be named"), "{}", refused(&taken));
    }

    #[test]
    fn only_our_accounts_with_a_token_of_a_node_are_served() {
        for user in [
            "admin",
            "system:node:node-a",
            "system:serviceaccount:default:holdfast-data",
            "system:serviceaccount:holdfast-system:holdfast-node",
            "system:serviceaccount:holdfast-system:holdfast-data:x",
            "system:serviceaccount:holdfast-system-2:holdfast-data",
            "",
        ] {
            let request = mk_request(|request| request.spec.username = Some(user.to_owned()));
            assert!(judge(&request, &RULES, NOW).is_err(), "{user}");
        }
        for nodes in [&[][..], &[""], &["node-a", "node-b"]] {
            let request = mk_request(|request| request.spec.extra = Some(bound_to(nodes)));
            assert!(refused(&request).contains("names no node"), "{nodes:?}");
        }
        assert!(refused(&mk_request(|request| request.spec.extra = None)).contains("names no node"));
    }

    #[test]
    fn usages_lifetime_age_and_signer_are_as_allowed() {
        for usages in [&USAGES[..2], &["digital signature", "server auth", "client auth", "cert sign"], &[]] {
            let request = mk_request(|request| {
                request.spec.usages = Some(usages.iter().map(|&usage| usage.to_owned()).collect());
            });
            assert!(refused(&request).contains("usages"), "{usages:?}");
        }
        for life in [86_401, 0, -1] {
            let request = mk_request(|request| request.spec.expiration_seconds = Some(life));
            assert!(refused(&request).contains("life"), "{life}");
        }
        for age in [601, -301] {
            let request = mk_request(|request| {
                request.metadata.creation_timestamp = Some(Time(Timestamp::from_second(NOW - age).unwrap()));
            });
            assert!(refused(&request).contains("s old"), "{age}");
        }
        let foreign =
            mk_request(|request| request.spec.signer_name = "kubernetes.io/kube-apiserver-client".to_owned());
        assert!(refused(&foreign).contains("not served here"));
    }

    #[test]
    fn another_signer_is_left_nothing_to_decide() {
        const SIGNER: &str = "issuers.cert-manager.io/holdfast-system.holdfast";
        let rules = Rules { signer: SIGNER, ..RULES };
        let mk_foreign = |change: &dyn Fn(&mut CertificateSigningRequest)| {
            let request = mk_request(|request| {
                request.spec.signer_name = SIGNER.to_owned();
                change(request);
            });
            judge(&request, &rules, NOW)
        };
        assert_eq!(mk_foreign(&|_| {}).unwrap().life_s, 3600);
        for key in
            ["experimental.cert-manager.io/request-is-ca", "experimental.cert-manager.io/request-duration"]
        {
            let refused = mk_foreign(&|request| {
                request.metadata.annotations = Some([(key.to_owned(), "true".to_owned())].into());
            });
            assert!(refused.unwrap_err().contains(key));
        }
        let endless = mk_foreign(&|request| request.spec.expiration_seconds = None);
        assert!(endless.unwrap_err().contains("leaves its life"));
    }

    #[test]
    fn a_request_that_two_readers_may_read_differently_is_refused() {
        let own = String::from_utf8(mk_pem(&["node-a"], |_| {})).unwrap();
        let other = String::from_utf8(mk_pem(&["node-b"], |_| {})).unwrap();
        let broken = other.replacen("-----END", "----END", 1);
        let headed = own.replacen("-----\n", "-----\nProc-Type: 4,ENCRYPTED\n\n", 1);
        for text in [format!("{own}{other}"), format!("{broken}{own}"), format!("# {own}"), headed] {
            let request = mk_request(|request| request.spec.request = ByteString(text.clone().into_bytes()));
            assert!(refused(&request).contains("plain PEM block"), "{text}");
        }
        let request =
            mk_request(|request| request.spec.request = ByteString(own.replace('\n', "\r\n").into_bytes()));
        assert!(judge(&request, &RULES, NOW).is_ok());
    }

    #[test]
    fn rubbish_forged_requests_and_authorities_are_refused() {
        let authority =
            |params: &mut CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        for bytes in [b"".to_vec(), vec![0xff, 0xfe], b"-----BEGIN CERTIFICATE REQUEST-----".to_vec()] {
            assert!(
                judge(&mk_request(|request| request.spec.request = ByteString(bytes)), &RULES, NOW).is_err()
            );
        }
        let request = mk_request(|request| request.spec.request = ByteString(mk_pem(&["node-a"], authority)));
        assert!(judge(&request, &RULES, NOW).is_err());
        // Whoever has a public key only cannot sign with it: one changed bit of the signature.
        let mut forged = mk_request(|_| {});
        let text = String::from_utf8(forged.spec.request.0.clone()).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let last = lines.len() - 2;
        let flipped = if lines[last].starts_with('A') { "B" } else { "A" };
        lines[last].replace_range(0..1, flipped);
        forged.spec.request = ByteString(lines.join("\n").into_bytes());
        assert!(judge(&forged, &RULES, NOW).is_err());
    }
}
