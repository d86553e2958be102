//! The CA against the verifier that the proxies use.

use super::*;
use crate::csr::Csr;
use model::Identity;
use rustls::RootCertStore;
use rustls::pki_types::UnixTime;
use rustls::server::WebPkiClientVerifier;
use std::fs;
use x509_parser::extensions::{GeneralName, ParsedExtension};

const TD: &str = "cluster.local";
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn request(key: &KeyPair) -> LeafRequest {
    LeafRequest {
        public_key: key.subject_public_key_info(),
        identity: Identity::new(TD, "shop", "web"),
        dns_names: vec![],
        addresses: vec![],
        lifetime: DAY,
    }
}

fn key() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

#[expect(clippy::unwrap_in_result, reason = "set-up, not what is tested")]
fn verify(
    issued: &Issued,
    roots: &[CertificateDer<'static>],
    now: SystemTime,
) -> Result<(), rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut store = RootCertStore::empty();
    roots.iter().for_each(|root| store.add(root.clone()).unwrap());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(store.into(), provider).build().unwrap();
    let now = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap());
    verifier.verify_client_cert(&issued.chain[0], &issued.chain[1..], now).map(|_| ())
}

#[test]
fn a_leaf_says_what_we_decided_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let key = key();
    let issued = ca.sign_now(&request(&key), start()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();

    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    assert!(!leaf.is_ca());
    assert_eq!(leaf.subject().iter().count(), 0);
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical, "a certificate without subject has a critical SAN");
    assert_eq!(
        san.value.general_names,
        [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")]
    );
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.digital_signature());
    assert!(!usage.value.key_cert_sign() && !usage.value.crl_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.client_auth && extended.server_auth && !extended.any);
    assert_eq!(validity(&leaf), (start() - LEAF_BACKDATE, start() + DAY));
    assert_eq!(issued.not_after, start() + DAY);
    assert_eq!(leaf.raw_serial_as_string().replace(':', ""), issued.serial);
    let other = ca.sign_now(&request(&key), start()).unwrap();
    assert_ne!(other.serial, issued.serial);
}

#[test]
fn the_names_in_a_csr_are_not_granted() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let key = key();
    let mut wishes = CertificateParams::default();
    wishes.subject_alt_names = vec![
        SanType::DnsName("istiod.istio-system.svc".try_into().unwrap()),
        SanType::IpAddress([127, 0, 0, 1].into()),
    ];
    wishes.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    wishes.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let pem = wishes.serialize_request(&key).unwrap().pem().unwrap();
    let csr = Csr::parse(&pem).unwrap();
    let issued =
        ca.sign_now(&LeafRequest { public_key: csr.public_key, ..request(&key) }, start()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(leaf.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    assert!(!leaf.is_ca());
    assert!(!leaf.key_usage().unwrap().unwrap().value.key_cert_sign());
}

#[test]
fn node_and_server_certificates_carry_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let key = key();
    let node = LeafRequest {
        dns_names: vec!["node-1.node.ambit.io".into()],
        addresses: vec![[10, 89, 0, 1].into()],
        ..request(&key)
    };
    let issued = ca.sign_now(&node, start()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(
        leaf.subject_alternative_name().unwrap().unwrap().value.general_names,
        [
            GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web"),
            GeneralName::DNSName("node-1.node.ambit.io"),
            GeneralName::IPAddress(&[10, 89, 0, 1]),
        ]
    );
}

#[test]
fn short_leaves_are_backdated_less() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let lifetime = Duration::from_secs(10);
    let issued = ca.sign_now(&LeafRequest { lifetime, ..request(&key()) }, start()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(validity(&leaf), (start() - Duration::from_secs(1), start() + lifetime));
}

#[test]
fn chains_verify_within_their_time_and_against_their_root_only() {
    let (dir, foreign) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let other = LocalCa::open(foreign.path(), TD, start()).unwrap();
    let issued = ca.sign_now(&request(&key()), start()).unwrap();
    let check = |roots: &[CertificateDer<'static>], now: SystemTime, ok: bool| {
        let got = verify(&issued, roots, now);
        assert_eq!(got.is_ok(), ok, "{got:?}");
    };
    check(&ca.roots(), start(), true);
    check(&other.roots(), start(), false);
    check(&ca.roots(), start() + DAY - HOUR, true);
    check(&ca.roots(), start() + DAY + HOUR, false);
    check(&ca.roots(), start() - Duration::from_secs(60), true);
    check(&ca.roots(), start() - HOUR, false);
}

#[test]
fn a_restart_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let first = LocalCa::open(dir.path(), TD, start()).unwrap();
    let issued = first.sign_now(&request(&key()), start()).unwrap();
    let second = LocalCa::open(dir.path(), TD, start() + HOUR).unwrap();
    assert_eq!(first.roots(), second.roots());
    assert_eq!(first.intermediate().certificate, second.intermediate().certificate);
    verify(&issued, &second.roots(), start() + HOUR).unwrap();
    let on_disk =
        CertificateDer::from_pem_slice(&fs::read(dir.path().join(ROOT_CERT)).unwrap()).unwrap();
    assert_eq!(vec![on_disk], first.roots());
}

#[test]
fn the_intermediate_is_renewed_and_never_outlives_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let old = ca.intermediate().certificate.clone();
    ca.maintain(TD, start() + 180 * DAY).unwrap();
    assert_eq!(ca.intermediate().certificate, old, "not due yet");
    let issued_by_old = ca.sign_now(&request(&key()), start() + 183 * DAY).unwrap();
    ca.maintain(TD, start() + 183 * DAY).unwrap();
    assert_ne!(ca.intermediate().certificate, old);
    verify(&issued_by_old, &ca.roots(), start() + 183 * DAY).unwrap();
    let issued_by_new = ca.sign_now(&request(&key()), start() + 183 * DAY).unwrap();
    verify(&issued_by_new, &ca.roots(), start() + 183 * DAY).unwrap();

    // The last year of the root: chains shorten.
    let late = start() + ROOT_LIFETIME - HOUR;
    let ca = LocalCa::open(dir.path(), TD, late).unwrap();
    assert_eq!(ca.expiry().intermediate, ca.expiry().root);
    assert_eq!(ca.sign_now(&request(&key()), late).unwrap().not_after, start() + ROOT_LIFETIME);
}

#[test]
fn a_full_disk_at_renewal_is_reported_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let old = ca.intermediate().certificate.clone();
    // Stands in for a full disk: the write fails.
    fs::remove_dir_all(dir.path()).unwrap();
    let error = ca.maintain(TD, start() + 200 * DAY).unwrap_err().to_string();
    assert!(error.contains(INTERMEDIATE_KEY), "{error}");
    assert_ne!(ca.intermediate().certificate, old);
    ca.sign_now(&request(&key()), start() + 200 * DAY).unwrap();
}

#[test]
fn wrong_clocks_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let check = |now: SystemTime, want: Option<&str>| {
        let opened = LocalCa::open(dir.path(), TD, now).map(|_| ()).map_err(|e| e.to_string());
        let signed = ca.sign_now(&request(&key()), now).map(|_| ()).map_err(|e| e.to_string());
        match want {
            None => assert_eq!((opened, signed), (Ok(()), Ok(()))),
            Some(part) => {
                for error in [opened.unwrap_err(), signed.unwrap_err()] {
                    assert!(error.contains(part), "{error} should say {part}");
                    assert!(error.contains("clock"), "{error}");
                }
            }
        }
    };
    check(start(), None);
    check(start() - HOUR, None);
    check(start() - CA_BACKDATE - HOUR, Some("only in 1h 0m"));
    check(start() - CA_BACKDATE - 2 * DAY, Some("only in 2d 0h"));
    check(start() + ROOT_LIFETIME + 90 * Duration::from_secs(1), Some("expired 1m 30s ago"));
}

#[test]
fn spoilt_state_is_an_error_that_says_what_to_do() {
    let foreign = tempfile::tempdir().unwrap();
    LocalCa::open(foreign.path(), TD, start()).unwrap();
    let check = |spoil: &dyn Fn(&Path), want: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        LocalCa::open(dir.path(), TD, start()).unwrap();
        spoil(dir.path());
        match (LocalCa::open(dir.path(), TD, start()), want) {
            (Ok(_), []) => {}
            (Ok(_), want) => panic!("opened, should say {want:?}"),
            (Err(e), want) => {
                let e = e.to_string();
                assert!(!want.is_empty(), "{e}");
                want.iter().for_each(|part| assert!(e.contains(part), "{e} should say {part}"));
            }
        }
    };
    let garbage = |name: &'static str| {
        move |dir: &Path| files::write_atomic(&dir.join(name), b"\0garbage", 0o600).unwrap()
    };
    let borrow = |name: &'static str| {
        let from = foreign.path().join(name);
        move |dir: &Path| _ = fs::copy(&from, dir.join(name)).unwrap()
    };
    let remove = |name: &'static str| move |dir: &Path| fs::remove_file(dir.join(name)).unwrap();
    let expose = |name: &'static str| {
        use std::os::unix::fs::PermissionsExt;
        move |dir: &Path| {
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o644)).unwrap();
        }
    };
    check(&|_| {}, &[]);
    check(&garbage(ROOT_CERT), &[ROOT_CERT, "every proxy must then restart"]);
    check(&garbage(ROOT_KEY), &[ROOT_KEY, "backup"]);
    check(&borrow(ROOT_KEY), &["do not belong together"]);
    check(&remove(ROOT_KEY), &["missing"]);
    check(&expose(ROOT_KEY), &["chmod 600", ROOT_KEY]);
    check(&expose(INTERMEDIATE_KEY), &["chmod 600", INTERMEDIATE_KEY]);
    check(&expose(ROOT_CERT), &[]);
    check(&garbage(INTERMEDIATE_CERT), &["remove intermediate-cert.pem and intermediate-key.pem"]);
    check(
        &|dir| {
            borrow(INTERMEDIATE_CERT)(dir);
            borrow(INTERMEDIATE_KEY)(dir);
        },
        &["not signed by root-cert.pem"],
    );
    check(&remove(INTERMEDIATE_CERT), &[]);
    check(
        &|dir| {
            fs::copy(dir.join("intermediate-cert.pem"), dir.join(ROOT_CERT)).unwrap();
        },
        &["do not belong together"],
    );
}

#[test]
fn a_crash_between_key_and_certificate_is_no_trouble() {
    let dir = tempfile::tempdir().unwrap();
    files::write_atomic(&dir.path().join(ROOT_KEY), b"half", files::SECRET).unwrap();
    LocalCa::open(dir.path(), TD, start()).unwrap();
    LocalCa::open(dir.path(), TD, start()).unwrap();
}

#[test]
fn intermediates_sign_no_further_authorities() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), TD, start()).unwrap();
    let above = ca.intermediate();
    let (_, parsed) = X509Certificate::from_der(&above.certificate).unwrap();
    let constraint = parsed.extensions().iter().find_map(|e| match e.parsed_extension() {
        ParsedExtension::BasicConstraints(b) => Some(b.path_len_constraint),
        _ => None,
    });
    assert_eq!(constraint, Some(Some(0)));
}
