//! The life cycle of the CA and the serving certificate that the replicas share: decides from their contents and the
//! time what to generate or renew. Storing and publishing them lives in secret.rs.
//!
//! A client must never get a certificate that it does not trust. So a new CA is published before it signs anything. An
//! old CA stays trusted until it expires, which is after every certificate that it signed. The rotation need not know
//! whether all replicas have switched.

use std::sync::Arc;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use thiserror::Error;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;

use super::tls::{Certificate, CertificatePem};

/// Limit on a client's clock skew. A new certificate is valid from this long ago, or a tenth of its lifetime if that is
/// less.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// The replicas' shared CA and certificate, as PEM texts. Each text may be empty or invalid: people edit Secrets. No
/// `Debug`: it holds the private keys.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct CertificateBundle {
    /// The CA certificates that clients must trust, newest first.
    pub ca_certificates: String,
    /// The newest CA's private key.
    pub ca_key: String,
    /// The serving certificate.
    pub certificate: String,
    /// The serving certificate's private key.
    pub key: String,
}

/// Requirements for the serving certificate and its CA.
#[derive(Clone, Debug)]
pub struct CertificateSpec {
    names: Vec<String>,
    certificate_lifetime: Duration,
    ca_lifetime: Duration,
}

/// Why a specification is invalid.
#[derive(Debug, Error)]
pub enum CertificateSpecError {
    /// There is no DNS name.
    #[error(
        "no DNS name is given; set --tls-dns-name to the names by which the API server calls the webhook"
    )]
    NoName,
    /// A name is not a DNS name.
    #[error("{0:?} is not a DNS name; correct --tls-dns-name")]
    Name(String),
    /// The CA must outlive the certificates that it signs, and its successor must take over before it expires.
    #[error("--tls-ca-lifetime must be at least twice --tls-lifetime, which must be at least 5s")]
    Lifetimes,
}

impl CertificateSpec {
    /// Specifies a certificate for these DNS names.
    ///
    /// # Errors
    /// [`CertificateSpecError`]
    pub fn new(
        names: Vec<String>,
        certificate_lifetime: Duration,
        ca_lifetime: Duration,
    ) -> Result<Self, CertificateSpecError> {
        if names.is_empty() {
            return Err(CertificateSpecError::NoName);
        }
        if let Some(name) = names
            .iter()
            .find(|name| ServerName::try_from(name.as_str()).is_err())
        {
            return Err(CertificateSpecError::Name(name.clone()));
        }
        if certificate_lifetime < Duration::from_secs(5) || ca_lifetime / 2 < certificate_lifetime {
            return Err(CertificateSpecError::Lifetimes);
        }
        Ok(Self {
            names,
            certificate_lifetime,
            ca_lifetime,
        })
    }

    /// Returns the reconcile interval: a twentieth of the certificate's lifetime, at most ten seconds.
    #[must_use]
    pub fn interval(&self) -> Duration {
        (self.certificate_lifetime / 20).min(Duration::from_secs(10))
    }

    /// Returns the bundle that must replace this one; `None` if it needs no change. `now` is in seconds since the
    /// epoch. `is_propagated` means that the newest CA was published long enough ago for all clients to trust it.
    ///
    /// # Errors
    /// If a key or certificate cannot be generated.
    pub fn next(
        &self,
        bundle: &CertificateBundle,
        now: i64,
        is_propagated: bool,
    ) -> Result<Option<CertificateBundle>, rcgen::Error> {
        let mut trusted = unexpired_cas(&bundle.ca_certificates, now);
        let mut next = bundle.clone();
        let signer = trusted
            .first()
            .filter(|newest| newest.is_valid_for(now, self.certificate_lifetime))
            .and_then(|newest| newest.signer(&bundle.ca_key));
        let is_new_ca = signer.is_none();
        let signer = match signer {
            Some(signer) => signer,
            None => {
                let (ca, signer) = self.generate_ca(now)?;
                next.ca_key = signer.key().serialize_pem();
                trusted.insert(0, ca);
                signer
            }
        };
        next.ca_certificates = trusted.iter().map(|ca| format!("{}\n", ca.pem)).collect();
        let names = match accepted_certificate(bundle, &trusted, now) {
            None => Some(self.names.clone()),
            // Clients may not trust the newest CA yet.
            Some(_) if is_new_ca || !is_propagated => None,
            Some(accepted) if self.is_renewal_due(&accepted, now) => Some(self.names.clone()),
            // During a rollout, other replicas may need the old names: add this replica's to them.
            Some(accepted) => {
                let is_missing = |name: &&String| !accepted.names.contains(name);
                let mut names: Vec<String> =
                    self.names.iter().filter(is_missing).cloned().collect();
                (!names.is_empty()).then(|| {
                    names.extend(accepted.names);
                    names
                })
            }
        };
        if let Some(names) = names {
            (next.certificate, next.key) = self.issue_certificate(&signer, names, now)?;
        }
        Ok((next != *bundle).then_some(next))
    }

    fn is_renewal_due(&self, accepted: &AcceptedCertificate, now: i64) -> bool {
        let third = seconds(self.certificate_lifetime / 3);
        accepted.not_after.saturating_sub(now) < third || !accepted.is_signed_by_newest_ca
    }

    fn generate_ca(&self, now: i64) -> Result<(CaCertificate, Signer), rcgen::Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let name = format!("{}-ca@{now}", env!("CARGO_PKG_NAME"));
        params.distinguished_name.push(DnType::CommonName, name);
        let not_after = set_validity(&mut params, now, self.ca_lifetime);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let pem = issuer.pem().trim().to_owned();
        let der = issuer.der().clone();
        // Parsed back from DER, as a replica that reads the Secret does.
        let signer =
            Issuer::from_ca_cert_der(&der, KeyPair::try_from(issuer.key().serialize_der())?)?;
        let ca = CaCertificate {
            pem,
            der,
            not_after,
        };
        Ok((ca, signer))
    }

    fn issue_certificate(
        &self,
        signer: &Signer,
        names: Vec<String>,
        now: i64,
    ) -> Result<(String, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(names)?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, self.certificate_lifetime);
        Ok((params.signed_by(&key, signer)?.pem(), key.serialize_pem()))
    }
}

impl CertificateBundle {
    /// Returns the stored bundle, repaired from the one in memory if clients would not accept its certificate. So they
    /// keep trusting the replicas even if the Secret is deleted or damaged.
    #[must_use]
    pub fn restored(stored: Option<Self>, in_memory: &Self, now: i64) -> Self {
        let Some(mut bundle) = stored else {
            return in_memory.clone();
        };
        if bundle.is_accepted(now) {
            return bundle;
        }
        bundle.ca_certificates += &in_memory.ca_certificates;
        if !bundle.is_accepted(now) {
            bundle.certificate.clone_from(&in_memory.certificate);
            bundle.key.clone_from(&in_memory.key);
        }
        bundle
    }

    /// Reports whether clients that trust the bundle's CAs accept its certificate.
    #[must_use]
    pub fn is_accepted(&self, now: i64) -> bool {
        accepted_certificate(self, &unexpired_cas(&self.ca_certificates, now), now).is_some()
    }
}

/// A certificate that clients accept.
struct AcceptedCertificate {
    names: Vec<String>,
    /// In seconds since the epoch.
    not_after: i64,
    is_signed_by_newest_ca: bool,
}

/// Returns the bundle's certificate if clients that trust these CAs accept it under its first name.
fn accepted_certificate(
    bundle: &CertificateBundle,
    trusted: &[CaCertificate],
    now: i64,
) -> Option<AcceptedCertificate> {
    let pem = CertificatePem {
        certificate: bundle.certificate.clone().into_bytes(),
        key: bundle.key.clone().into_bytes(),
        client_ca: None,
    };
    let Certificate { not_after, .. } = Certificate::from_pem(&pem).ok()?;
    let leaf = CertificateDer::from_pem_slice(&pem.certificate).ok()?;
    let names = names(&leaf)?;
    let is_accepted = |cas: &[CaCertificate]| {
        let at = UnixTime::since_unix_epoch(Duration::from_secs(now.unsigned_abs()));
        let name = names
            .first()
            .and_then(|name| ServerName::try_from(name.as_str()).ok());
        verifier(cas).zip(name).is_some_and(|(verifier, name)| {
            verifier
                .verify_server_cert(&leaf, &[], &name, &[], at)
                .is_ok()
        })
    };
    is_accepted(trusted).then(|| AcceptedCertificate {
        is_signed_by_newest_ca: trusted.get(..1).is_some_and(is_accepted),
        names: names.clone(),
        not_after,
    })
}

/// Returns a certificate's DNS names.
fn names(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let alternative = parsed.subject_alternative_name().ok()??;
    let names = alternative.value.general_names.iter();
    let names = names.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    Some(names.collect())
}

type Signer = Issuer<'static, KeyPair>;

/// A CA certificate that clients must trust.
struct CaCertificate {
    pem: String,
    der: CertificateDer<'static>,
    not_after: i64,
}

impl CaCertificate {
    fn is_valid_for(&self, now: i64, duration: Duration) -> bool {
        self.not_after.saturating_sub(now) >= seconds(duration)
    }

    /// Returns the signer for this CA, if the key is the CA's.
    fn signer(&self, key: &str) -> Option<Signer> {
        let key = KeyPair::from_pem(key).ok()?;
        let (_, certificate) = x509_parser::parse_x509_certificate(&self.der).ok()?;
        let is_matching = certificate.public_key().raw == key.subject_public_key_info();
        Issuer::from_ca_cert_der(&self.der, key)
            .ok()
            .filter(|_| is_matching)
    }
}

/// Returns the unexpired CA certificates in a text, in order and without duplicates. Ignores all other text.
fn unexpired_cas(text: &str, now: i64) -> Vec<CaCertificate> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let blocks = text.split(END).filter_map(|before| {
        let begin = before.rfind(BEGIN)?;
        Some(format!("{}{END}", before.get(begin..)?))
    });
    let parse = |pem: String| {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).ok()?;
        let not_after = parsed.validity().not_after.timestamp();
        Some(CaCertificate {
            pem,
            der,
            not_after,
        })
    };
    let mut unexpired: Vec<CaCertificate> = Vec::new();
    for ca in blocks.filter_map(parse) {
        let is_duplicate = unexpired.iter().any(|other| other.der == ca.der);
        if ca.not_after > now && !is_duplicate {
            unexpired.push(ca);
        }
    }
    unexpired
}

fn verifier(cas: &[CaCertificate]) -> Option<Arc<WebPkiServerVerifier>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(cas.iter().map(|ca| ca.der.clone()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .ok()
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// Sets a certificate's validity period. Returns its end, in seconds since the epoch.
fn set_validity(params: &mut CertificateParams, now: i64, lifetime: Duration) -> i64 {
    let at = |timestamp| OffsetDateTime::from_unix_timestamp(timestamp);
    let from = now.saturating_sub(seconds(MAX_CLOCK_SKEW.min(lifetime / 10)));
    let to = now.saturating_add(seconds(lifetime));
    if let (Ok(from), Ok(to)) = (at(from), at(to)) {
        (params.not_before, params.not_after) = (from, to);
    }
    params.not_after.unix_timestamp()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 60 * 60;
    /// A day in 2026, in seconds since the epoch.
    const START: i64 = 1_790_000_000;

    fn spec(names: &[&str]) -> CertificateSpec {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        let days = |days: u64| Duration::from_secs(days * 24 * 60 * 60);
        CertificateSpec::new(names, days(90), days(365)).unwrap()
    }

    fn service() -> CertificateSpec {
        spec(&["w.ns.svc", "w.ns.svc.cluster.local"])
    }

    fn first() -> CertificateBundle {
        service()
            .next(&CertificateBundle::default(), START, false)
            .unwrap()
            .unwrap()
    }

    fn count(bundle: &CertificateBundle) -> usize {
        bundle.ca_certificates.matches("BEGIN CERTIFICATE").count()
    }

    /// Reports whether a client that trusts `ca_certificates` accepts the certificate in `served`.
    fn accepts(ca_certificates: &str, served: &CertificateBundle, now: i64) -> bool {
        let client = CertificateBundle {
            ca_certificates: ca_certificates.to_owned(),
            ..served.clone()
        };
        client.is_accepted(now)
    }

    #[test]
    fn empty_bundle_yields_one_ca_and_accepted_certificate() {
        let bundle = first();
        assert_eq!(count(&bundle), 1);
        assert!(bundle.is_accepted(START));
        // Accepted by a client whose clock is behind, and until it expires.
        assert!(bundle.is_accepted(START - 3000));
        assert!(bundle.is_accepted(START + 90 * DAY));
        assert!(!bundle.is_accepted(START + 90 * DAY + 1));
        for is_propagated in [false, true] {
            assert!(
                service()
                    .next(&bundle, START + 1, is_propagated)
                    .unwrap()
                    .is_none()
            );
        }
    }

    #[test]
    fn certificate_is_renewed_when_a_third_is_left() {
        let bundle = first();
        let at = |day| service().next(&bundle, START + day * DAY, true).unwrap();
        assert!(at(60).is_none());
        let renewed = at(61).unwrap();
        assert!(renewed.ca_certificates == bundle.ca_certificates);
        assert!(renewed.ca_key == bundle.ca_key);
        assert!(renewed.certificate != bundle.certificate && renewed.key != bundle.key);
        assert!(accepts(&bundle.ca_certificates, &renewed, START + 150 * DAY));
    }

    #[test]
    fn new_ca_signs_only_after_it_has_propagated() {
        let mut bundle = first();
        for day in [70, 140, 210] {
            bundle = service()
                .next(&bundle, START + day * DAY, true)
                .unwrap()
                .unwrap();
        }
        // 365 - 90: the old CA no longer outlives a certificate that it would sign.
        let (before, now) = (START + 275 * DAY, START + 275 * DAY + 1);
        assert!(service().next(&bundle, before, false).unwrap().is_none());
        let published = service().next(&bundle, now, true).unwrap().unwrap();
        assert_eq!(count(&published), 2);
        assert!(published.ca_certificates.ends_with(&bundle.ca_certificates));
        assert!(published.certificate == bundle.certificate && published.key == bundle.key);
        assert!(service().next(&published, now, false).unwrap().is_none());

        let signed = service().next(&published, now, true).unwrap().unwrap();
        assert!(signed.ca_certificates == published.ca_certificates);
        // Clients accept replicas with the old and with the new certificate.
        assert!(accepts(&signed.ca_certificates, &bundle, now));
        assert!(accepts(&signed.ca_certificates, &signed, now));
        assert!(!accepts(&bundle.ca_certificates, &signed, now));
        assert!(service().next(&signed, now, true).unwrap().is_none());

        let later = START + 366 * DAY;
        let after = service().next(&signed, later, true).unwrap().unwrap();
        assert_eq!(count(&after), 1);
        assert!(signed.ca_certificates.starts_with(&after.ca_certificates));
    }

    #[test]
    fn damaged_parts_are_regenerated_and_trusted_cas_stay() {
        let (bundle, other) = (first(), first());
        let damaged = |damage: &dyn Fn(&mut CertificateBundle)| {
            let mut damaged = bundle.clone();
            damage(&mut damaged);
            service()
                .next(&damaged, START, false)
                .unwrap()
                .map(|next| (damaged, next))
        };
        for key in ["", "no PEM", other.ca_key.as_str()] {
            let (_, next) = damaged(&|bundle| bundle.ca_key = key.to_owned()).unwrap();
            assert_eq!(count(&next), 2);
            // The certificate is still signed by the CA that clients trust.
            assert!(next.certificate == bundle.certificate);
        }
        type Damage<'d> = &'d dyn Fn(&mut CertificateBundle);
        let unusable: [Damage<'_>; 4] = [
            &|bundle| bundle.certificate.clear(),
            &|bundle| bundle.key = "no PEM".to_owned(),
            &|bundle| bundle.key = other.key.clone(),
            &|bundle| bundle.certificate = other.certificate.clone(),
        ];
        for damage in unusable {
            let (_, next) = damaged(damage).unwrap();
            assert!(next.ca_certificates == bundle.ca_certificates);
            assert!(accepts(&bundle.ca_certificates, &next, START));
        }
        let (_, next) = damaged(&|bundle| bundle.ca_certificates = "no PEM".to_owned()).unwrap();
        assert_eq!(count(&next), 1);
        assert!(next.is_accepted(START));
        let (_, next) =
            damaged(&|bundle| bundle.ca_certificates.insert_str(0, "# ours\n")).unwrap();
        assert!(next == bundle);
    }

    #[test]
    fn unusable_stored_bundle_is_restored_from_memory() {
        let (in_memory, other) = (first(), first());
        let restored = |stored| {
            let restored = CertificateBundle::restored(stored, &in_memory, START);
            let next = service().next(&restored, START, true).unwrap();
            next.unwrap_or(restored)
        };
        assert!(restored(None) == in_memory);
        // The Secret has another CA and no certificate: clients trust both CAs from now on.
        let no_certificate = CertificateBundle {
            certificate: String::new(),
            ..other.clone()
        };
        let next = restored(Some(no_certificate));
        assert_eq!(count(&next), 2);
        assert!(next.ca_certificates.starts_with(&other.ca_certificates));
        assert!(accepts(&next.ca_certificates, &in_memory, START));
        assert!(next.is_accepted(START));
        let next = restored(Some(CertificateBundle::default()));
        assert!(next.certificate == in_memory.certificate);
        assert_eq!(count(&next), 2);
        // A usable replacement in the Secret is used as it is.
        assert!(restored(Some(other.clone())) == other);
    }

    #[test]
    fn replicas_with_different_names_agree_on_all_names() {
        let mut bundle = first();
        let other = spec(&["w.ns.svc", "other.ns.svc"]);
        for (spec, changes) in [(&other, true), (&service(), false), (&other, false)] {
            assert!(spec.next(&bundle, START, false).unwrap().is_none(), "not propagated");
            let next = spec.next(&bundle, START, true).unwrap();
            assert_eq!(next.is_some(), changes);
            bundle = next.unwrap_or(bundle);
        }
        assert_eq!(count(&bundle), 1);
        let leaf = CertificateDer::from_pem_slice(bundle.certificate.as_bytes()).unwrap();
        assert_eq!(names(&leaf).unwrap(), ["other.ns.svc", "w.ns.svc", "w.ns.svc.cluster.local"]);
        // A renewal has only the names of the replica that renews.
        let renewed = other
            .next(&bundle, START + 61 * DAY, true)
            .unwrap()
            .unwrap();
        let leaf = CertificateDer::from_pem_slice(renewed.certificate.as_bytes()).unwrap();
        assert_eq!(names(&leaf).unwrap(), ["w.ns.svc", "other.ns.svc"]);
    }

    #[test]
    fn repeated_damage_adds_no_cas() {
        let in_memory = first();
        let mut stored = in_memory.clone();
        for _ in 0..3 {
            stored.certificate.clear();
            let restored = CertificateBundle::restored(Some(stored), &in_memory, START);
            stored = service()
                .next(&restored, START, true)
                .unwrap()
                .unwrap_or(restored);
        }
        assert!(stored == in_memory);
    }

    #[test]
    fn lagging_clients_accept_lagging_replicas_through_all_rotations() {
        // Three replicas and a client read the bundle at different times, days apart.
        let mut bundle = first();
        let mut replicas = [bundle.clone(), bundle.clone(), bundle.clone()];
        let mut client = bundle.ca_certificates.clone();
        let mut published_at = START;
        let mut ca_count = 1;
        for step in 0..800 {
            let now = START + step * DAY;
            let is_propagated = now - published_at >= 2 * DAY;
            if let Some(next) = service().next(&bundle, now, is_propagated).unwrap() {
                if next.ca_certificates != bundle.ca_certificates {
                    published_at = now;
                    ca_count += usize::from(next.ca_key != bundle.ca_key);
                }
                bundle = next;
            }
            let index = usize::try_from(step % 3).unwrap();
            replicas[index] = bundle.clone();
            for replica in &replicas {
                assert!(accepts(&client, replica, now), "step {step}");
            }
            client.clone_from(&bundle.ca_certificates);
        }
        // A new CA every 275 days.
        assert_eq!(ca_count, 3);
    }

    #[test]
    fn invalid_spec_is_rejected_and_names_the_flag() {
        let error = |names: &[&str], lifetime, ca_lifetime| {
            let names = names.iter().map(|&name| name.to_owned()).collect();
            let seconds = Duration::from_secs;
            CertificateSpec::new(names, seconds(lifetime), seconds(ca_lifetime))
                .err()
                .map(|error| error.to_string())
        };
        assert_eq!(error(&["a.b.svc"], 5, 10), None);
        assert!(error(&["a.b.svc"], u64::MAX, 10).is_some());
        assert!(error(&[], 5, 10).unwrap().contains("--tls-dns-name"));
        assert!(
            error(&["a b"], 5, 10)
                .unwrap()
                .starts_with("\"a b\" is not a DNS name")
        );
        for (lifetime, ca_lifetime) in [(4, 10), (10, 19)] {
            let error = error(&["a.b.svc"], lifetime, ca_lifetime);
            assert!(error.unwrap().contains("--tls-ca-lifetime"));
        }
    }
}
