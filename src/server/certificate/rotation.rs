//! The authority (CA) and the serving certificate that all replicas share: what must be made or renewed, from
//! what they hold and what time it is. Where it is kept and published is secret.rs's business.
//!
//! No client may ever meet a certificate that it does not trust yet, or not any more. So a new authority is
//! published first and signs later, and an old one stays trusted until it expires: no certificate that it
//! signed lives longer. Whether all replicas have changed over need not be known.

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

/// How far back a new certificate's validity begins, for clients whose clocks are behind. A tenth of its life
/// time if that is less.
const BACKDATED: Duration = Duration::from_secs(60 * 60);

/// What the replicas share, as PEM texts. Any of them may be empty, or no PEM at all: people edit Secrets. No
/// `Debug`: the keys are in it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct CertificateBundle {
    /// The authorities that clients are to trust, the newest first.
    pub authorities: String,
    /// The key of the newest authority.
    pub authority_key: String,
    /// The serving certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// What the serving certificate must be.
#[derive(Clone, Debug)]
pub struct CertificateSpec {
    names: Vec<String>,
    certificate_lifetime: Duration,
    authority_lifetime: Duration,
}

/// Why the spec certificate cannot be had.
#[derive(Debug, Error)]
pub enum CertificateSpecError {
    /// There is nothing to certify.
    #[error(
        "no DNS name is given; set --tls-dns-name to the names by which the API server calls the webhook"
    )]
    NoName,
    /// A name is no DNS name.
    #[error("{0:?} is no DNS name; correct --tls-dns-name")]
    Name(String),
    /// An authority must outlive the certificates that it signs, and its successor takes over before.
    #[error("--tls-ca-lifetime must be at least twice --tls-lifetime, and that at least 5s")]
    Lifetimes,
}

impl CertificateSpec {
    /// A certificate for these DNS names.
    ///
    /// # Errors
    /// [`CertificateSpecError`]
    pub fn new(
        names: Vec<String>,
        certificate_lifetime: Duration,
        authority_lifetime: Duration,
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
        if certificate_lifetime < Duration::from_secs(5)
            || authority_lifetime / 2 < certificate_lifetime
        {
            return Err(CertificateSpecError::Lifetimes);
        }
        Ok(Self {
            names,
            certificate_lifetime,
            authority_lifetime,
        })
    }

    /// How often to look whether something must be done: 20 times in a certificate's life, and every ten
    /// seconds at the least.
    #[must_use]
    pub fn interval(&self) -> Duration {
        (self.certificate_lifetime / 20).min(Duration::from_secs(10))
    }

    /// What must be bundle from now on, if it is not what is bundle. `now` is in seconds since the epoch;
    /// `is_settled` says that clients have had the time to learn the newest authority.
    ///
    /// # Errors
    /// If no key or certificate can be made.
    pub fn next(
        &self,
        bundle: &CertificateBundle,
        now: i64,
        is_settled: bool,
    ) -> Result<Option<CertificateBundle>, rcgen::Error> {
        let mut trusted = trusted(&bundle.authorities, now);
        let mut next = bundle.clone();
        let signer = trusted
            .first()
            .filter(|newest| newest.lasts(now, self.certificate_lifetime))
            .and_then(|newest| newest.signer(&bundle.authority_key));
        let is_new = signer.is_none();
        let signer = match signer {
            Some(signer) => signer,
            None => {
                let (authority, signer) = self.make_authority(now)?;
                next.authority_key = signer.key().serialize_pem();
                trusted.insert(0, authority);
                signer
            }
        };
        next.authorities = trusted.iter().map(|one| format!("{}\n", one.pem)).collect();
        let names = match serving(bundle, &trusted, now) {
            None => Some(self.names.clone()),
            // Nobody trusts the new authority yet.
            Some(_) if is_new || !is_settled => None,
            Some(serving) if self.is_due(&serving, now) => Some(self.names.clone()),
            // Replicas that want other names are about, perhaps in a rollout: it has to have theirs too.
            Some(serving) => {
                let lacking = |name: &&String| !serving.names.contains(name);
                let mut names: Vec<String> = self.names.iter().filter(lacking).cloned().collect();
                (!names.is_empty()).then(|| {
                    names.extend(serving.names);
                    names
                })
            }
        };
        if let Some(names) = names {
            (next.certificate, next.key) = self.make_certificate(&signer, names, now)?;
        }
        Ok((next != *bundle).then_some(next))
    }

    fn is_due(&self, serving: &Serving, now: i64) -> bool {
        let third = seconds(self.certificate_lifetime / 3);
        serving.not_after.saturating_sub(now) < third || !serving.is_of_the_newest
    }

    fn make_authority(&self, now: i64) -> Result<(Authority, Signer), rcgen::Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let name = format!("{}-ca@{now}", env!("CARGO_PKG_NAME"));
        params.distinguished_name.push(DnType::CommonName, name);
        let not_after = validity(&mut params, now, self.authority_lifetime);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let pem = issuer.pem().trim().to_owned();
        let der = issuer.der().clone();
        // What is read back later is what signs now.
        let signer =
            Issuer::from_ca_cert_der(&der, KeyPair::try_from(issuer.key().serialize_der())?)?;
        let authority = Authority {
            pem,
            der,
            not_after,
        };
        Ok((authority, signer))
    }

    fn make_certificate(
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
        validity(&mut params, now, self.certificate_lifetime);
        Ok((params.signed_by(&key, signer)?.pem(), key.serialize_pem()))
    }
}

impl CertificateBundle {
    /// What is kept, put right from what is remembered of it if nobody would accept a certificate by what is kept
    /// alone: clients go on trusting what the replicas serve, even if the Secret is deleted.
    #[must_use]
    pub fn restored(kept: Option<Self>, remembered: &Self, now: i64) -> Self {
        let Some(mut bundle) = kept else {
            return remembered.clone();
        };
        if bundle.is_accepted(now) {
            return bundle;
        }
        bundle.authorities += &remembered.authorities;
        if !bundle.is_accepted(now) {
            bundle.certificate.clone_from(&remembered.certificate);
            bundle.key.clone_from(&remembered.key);
        }
        bundle
    }

    /// Whether clients that trust the authorities that are bundle accept the certificate.
    #[must_use]
    pub fn is_accepted(&self, now: i64) -> bool {
        serving(self, &trusted(&self.authorities, now), now).is_some()
    }
}

/// The certificate that is bundle, if clients accept it by one of its names.
struct Serving {
    names: Vec<String>,
    /// In seconds since the epoch.
    not_after: i64,
    is_of_the_newest: bool,
}

fn serving(bundle: &CertificateBundle, trusted: &[Authority], now: i64) -> Option<Serving> {
    let pem = CertificatePem {
        certificate: bundle.certificate.clone().into_bytes(),
        key: bundle.key.clone().into_bytes(),
        client_ca: None,
    };
    let Certificate { not_after, .. } = Certificate::from_pem(&pem).ok()?;
    let leaf = CertificateDer::from_pem_slice(&pem.certificate).ok()?;
    let names = names(&leaf)?;
    let is_accepted = |authorities: &[Authority]| {
        let at = UnixTime::since_unix_epoch(Duration::from_secs(now.unsigned_abs()));
        let name = names
            .first()
            .and_then(|name| ServerName::try_from(name.as_str()).ok());
        verifier(authorities)
            .zip(name)
            .is_some_and(|(verifier, name)| {
                verifier
                    .verify_server_cert(&leaf, &[], &name, &[], at)
                    .is_ok()
            })
    };
    is_accepted(trusted).then(|| Serving {
        is_of_the_newest: trusted.get(..1).is_some_and(is_accepted),
        names: names.clone(),
        not_after,
    })
}

/// The DNS names of a certificate.
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

/// An authority that clients are to trust.
struct Authority {
    pem: String,
    der: CertificateDer<'static>,
    not_after: i64,
}

impl Authority {
    fn lasts(&self, now: i64, time: Duration) -> bool {
        self.not_after.saturating_sub(now) >= seconds(time)
    }

    /// What signs as this authority, if the key is its own.
    fn signer(&self, key: &str) -> Option<Signer> {
        let key = KeyPair::from_pem(key).ok()?;
        let (_, certificate) = x509_parser::parse_x509_certificate(&self.der).ok()?;
        let is_own = certificate.public_key().raw == key.subject_public_key_info();
        Issuer::from_ca_cert_der(&self.der, key)
            .ok()
            .filter(|_| is_own)
    }
}

/// The authorities in a text that have not expired, in its order, each once. What else is in it is passed over.
fn trusted(text: &str, now: i64) -> Vec<Authority> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    let blocks = text.split(END).filter_map(|before| {
        let begin = before.rfind(BEGIN)?;
        Some(format!("{}{END}", before.get(begin..)?))
    });
    let authority = |pem: String| {
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).ok()?;
        let not_after = parsed.validity().not_after.timestamp();
        Some(Authority {
            pem,
            der,
            not_after,
        })
    };
    let mut trusted: Vec<Authority> = Vec::new();
    for authority in blocks.filter_map(authority) {
        let is_known = trusted.iter().any(|known| known.der == authority.der);
        if authority.not_after > now && !is_known {
            trusted.push(authority);
        }
    }
    trusted
}

fn verifier(authorities: &[Authority]) -> Option<Arc<WebPkiServerVerifier>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(authorities.iter().map(|authority| authority.der.clone()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .ok()
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

/// Sets when a certificate is valid; the end of it, in seconds since the epoch.
fn validity(params: &mut CertificateParams, now: i64, lifetime: Duration) -> i64 {
    let at = |timestamp| OffsetDateTime::from_unix_timestamp(timestamp);
    let from = now.saturating_sub(seconds(BACKDATED.min(lifetime / 10)));
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
    /// Some day in 2026.
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
        bundle.authorities.matches("BEGIN CERTIFICATE").count()
    }

    /// Whether a client that trusts `authorities` accepts what `served` has.
    fn accepts(authorities: &str, served: &CertificateBundle, now: i64) -> bool {
        let client = CertificateBundle {
            authorities: authorities.to_owned(),
            ..served.clone()
        };
        client.is_accepted(now)
    }

    #[test]
    fn out_of_nothing_come_one_authority_and_a_certificate_that_its_clients_accept() {
        let bundle = first();
        assert_eq!(count(&bundle), 1);
        assert!(bundle.is_accepted(START));
        // A client's clock may be behind, and by the end of its life nobody accepts it.
        assert!(bundle.is_accepted(START - 3000));
        assert!(bundle.is_accepted(START + 90 * DAY));
        assert!(!bundle.is_accepted(START + 90 * DAY + 1));
        for settled in [false, true] {
            assert!(
                service()
                    .next(&bundle, START + 1, settled)
                    .unwrap()
                    .is_none()
            );
        }
    }

    #[test]
    fn a_certificate_is_renewed_when_a_third_of_its_life_is_left() {
        let bundle = first();
        let at = |day| service().next(&bundle, START + day * DAY, true).unwrap();
        assert!(at(60).is_none());
        let renewed = at(61).unwrap();
        assert!(renewed.authorities == bundle.authorities);
        assert!(renewed.authority_key == bundle.authority_key);
        assert!(renewed.certificate != bundle.certificate && renewed.key != bundle.key);
        assert!(accepts(&bundle.authorities, &renewed, START + 150 * DAY));
    }

    #[test]
    fn a_new_authority_is_published_first_and_signs_once_clients_know_it() {
        let mut bundle = first();
        for day in [70, 140, 210] {
            bundle = service()
                .next(&bundle, START + day * DAY, true)
                .unwrap()
                .unwrap();
        }
        // 365 - 90: the old authority no longer outlives what it would sign.
        let (before, now) = (START + 275 * DAY, START + 275 * DAY + 1);
        assert!(service().next(&bundle, before, false).unwrap().is_none());
        let published = service().next(&bundle, now, true).unwrap().unwrap();
        assert_eq!(count(&published), 2);
        assert!(published.authorities.ends_with(&bundle.authorities));
        assert!(published.certificate == bundle.certificate && published.key == bundle.key);
        assert!(service().next(&published, now, false).unwrap().is_none());

        let signed = service().next(&published, now, true).unwrap().unwrap();
        assert!(signed.authorities == published.authorities);
        // Replicas that are behind are accepted, and so are those that are not.
        assert!(accepts(&signed.authorities, &bundle, now));
        assert!(accepts(&signed.authorities, &signed, now));
        assert!(!accepts(&bundle.authorities, &signed, now));
        assert!(service().next(&signed, now, true).unwrap().is_none());

        let later = START + 366 * DAY;
        let after = service().next(&signed, later, true).unwrap().unwrap();
        assert_eq!(count(&after), 1);
        assert!(signed.authorities.starts_with(&after.authorities));
    }

    #[test]
    fn what_is_damaged_is_made_anew_and_what_clients_trust_stays_trusted() {
        let (bundle, other) = (first(), first());
        let damaged = |damage: &dyn Fn(&mut CertificateBundle)| {
            let mut damaged = bundle.clone();
            damage(&mut damaged);
            service()
                .next(&damaged, START, false)
                .unwrap()
                .map(|next| (damaged, next))
        };
        for key in ["", "no PEM", other.authority_key.as_str()] {
            let (_, next) = damaged(&|bundle| bundle.authority_key = key.to_owned()).unwrap();
            assert_eq!(count(&next), 2);
            // The certificate is of the authority that clients know.
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
            assert!(next.authorities == bundle.authorities);
            assert!(accepts(&bundle.authorities, &next, START));
        }
        let (_, next) = damaged(&|bundle| bundle.authorities = "no PEM".to_owned()).unwrap();
        assert_eq!(count(&next), 1);
        assert!(next.is_accepted(START));
        let (_, next) = damaged(&|bundle| bundle.authorities.insert_str(0, "# ours\n")).unwrap();
        assert!(next == bundle);
    }

    #[test]
    fn what_is_deleted_or_damaged_comes_back_from_memory_unless_what_is_left_is_good() {
        let (remembered, other) = (first(), first());
        let restored = |kept| {
            let restored = CertificateBundle::restored(kept, &remembered, START);
            let next = service().next(&restored, START, true).unwrap();
            next.unwrap_or(restored)
        };
        assert!(restored(None) == remembered);
        // A kept authority is gone, and so is what it signed: both are trusted from now on.
        let no_certificate = CertificateBundle {
            certificate: String::new(),
            ..other.clone()
        };
        let next = restored(Some(no_certificate));
        assert_eq!(count(&next), 2);
        assert!(next.authorities.starts_with(&other.authorities));
        assert!(accepts(&remembered.authorities, &remembered, START));
        assert!(next.is_accepted(START));
        let next = restored(Some(CertificateBundle::default()));
        assert!(next.certificate == remembered.certificate);
        assert_eq!(count(&next), 2);
        // What somebody put in place of it, or left out of it, on purpose.
        assert!(restored(Some(other.clone())) == other);
    }

    #[test]
    fn replicas_that_want_other_names_agree_on_a_certificate_with_all_of_them() {
        let mut bundle = first();
        let other = spec(&["w.ns.svc", "other.ns.svc"]);
        for (spec, changes) in [(&other, true), (&service(), false), (&other, false)] {
            assert!(
                spec.next(&bundle, START, false).unwrap().is_none(),
                "it is not settled"
            );
            let next = spec.next(&bundle, START, true).unwrap();
            assert_eq!(next.is_some(), changes);
            bundle = next.unwrap_or(bundle);
        }
        assert!(bundle.authorities == first_authorities(&bundle));
        let leaf = CertificateDer::from_pem_slice(bundle.certificate.as_bytes()).unwrap();
        assert_eq!(
            names(&leaf).unwrap(),
            ["other.ns.svc", "w.ns.svc", "w.ns.svc.cluster.local"]
        );
        // Once it is due, only those that are spec then.
        let renewed = other
            .next(&bundle, START + 61 * DAY, true)
            .unwrap()
            .unwrap();
        let leaf = CertificateDer::from_pem_slice(renewed.certificate.as_bytes()).unwrap();
        assert_eq!(names(&leaf).unwrap(), ["w.ns.svc", "other.ns.svc"]);
    }

    /// The authorities as they are bundle when there is one.
    fn first_authorities(bundle: &CertificateBundle) -> String {
        assert_eq!(count(bundle), 1);
        bundle.authorities.clone()
    }

    #[test]
    fn what_is_damaged_again_and_again_does_not_make_the_authorities_more() {
        let remembered = first();
        let mut kept = remembered.clone();
        for _ in 0..3 {
            kept.certificate.clear();
            let restored = CertificateBundle::restored(Some(kept), &remembered, START);
            kept = service()
                .next(&restored, START, true)
                .unwrap()
                .unwrap_or(restored);
        }
        assert!(kept == remembered);
    }

    #[test]
    fn through_years_of_rotation_clients_that_are_behind_accept_replicas_that_are_behind() {
        // Three replicas and a client look at what is bundle at different times, days apart.
        let mut bundle = first();
        let mut replicas = [bundle.clone(), bundle.clone(), bundle.clone()];
        let mut client = bundle.authorities.clone();
        let mut known_since = START;
        let mut authorities = 1;
        for step in 0..800 {
            let now = START + step * DAY;
            let is_settled = now - known_since >= 2 * DAY;
            if let Some(next) = service().next(&bundle, now, is_settled).unwrap() {
                if next.authorities != bundle.authorities {
                    known_since = now;
                    authorities += usize::from(next.authority_key != bundle.authority_key);
                }
                bundle = next;
            }
            let behind = usize::try_from(step % 3).unwrap();
            replicas[behind] = bundle.clone();
            for replica in &replicas {
                assert!(accepts(&client, replica, now), "step {step}");
            }
            client.clone_from(&bundle.authorities);
        }
        // A new one every 275 days.
        assert_eq!(authorities, 3);
    }

    #[test]
    fn what_cannot_be_wanted_is_refused_with_the_flag_to_correct() {
        let of = |names: &[&str], lifetime, authority_lifetime| {
            let names = names.iter().map(|&name| name.to_owned()).collect();
            let seconds = Duration::from_secs;
            CertificateSpec::new(names, seconds(lifetime), seconds(authority_lifetime))
                .err()
                .map(|error| error.to_string())
        };
        assert_eq!(of(&["a.b.svc"], 5, 10), None);
        assert!(of(&["a.b.svc"], u64::MAX, 10).is_some());
        assert!(of(&[], 5, 10).unwrap().contains("--tls-dns-name"));
        assert!(
            of(&["a b"], 5, 10)
                .unwrap()
                .starts_with("\"a b\" is no DNS name")
        );
        for (lifetime, authority_lifetime) in [(4, 10), (10, 19)] {
            let error = of(&["a.b.svc"], lifetime, authority_lifetime);
            assert!(error.unwrap().contains("--tls-ca-lifetime"));
        }
    }
}
