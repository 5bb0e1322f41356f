use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::time::Duration;

use super::*;

const HOUR: Duration = Duration::from_hours(1);

fn now() -> u64 {
    crate::now_us() / 1_000_000
}

#[test]
fn two_who_make_the_authority_at_once_have_the_same_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pki");
    let clusters: Vec<ClusterId> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| Authority::open_or_create_at(&path).unwrap().issue("a/1", HOUR).unwrap().cluster_id())
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(clusters.windows(2).all(|two| two[0] == two[1]), "{clusters:?}");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    for file in fs::read_dir(&path).unwrap() {
        let file = file.unwrap();
        assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", file.file_name());
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["pki"], "nothing half made is left behind");
    assert_eq!(Authority::open_at(&path).unwrap().issued().unwrap().len(), 8);
}

#[test]
fn an_identity_survives_its_directory_and_is_what_its_certificate_says() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create_at(&dir.path().join("pki")).unwrap();
    let issued = authority.issue("sw-1/3", HOUR).unwrap();
    assert!(issued.cert().len() < 420, "the certificate travels in datagrams: {}", issued.cert().len());
    let at = dir.path().join("node");
    issued.store(&at).unwrap();
    let loaded = Identity::load(&at).unwrap();
    assert_eq!(
        (loaded.node_id(), loaded.cluster_id(), loaded.cert()),
        ("sw-1/3", authority.cluster_id(), issued.cert())
    );
    assert_eq!(loaded.ring(), &authority.ring().unwrap());
    assert_eq!(fs::metadata(at.join("node.key")).unwrap().mode() & 0o777, 0o600);

    let shown = loaded.trust().check(loaded.cert(), now()).unwrap();
    assert_eq!(shown.node_id, "sw-1/3");
    let key = ::ring::signature::UnparsedPublicKey::new(&::ring::signature::ED25519, shown.public_key);
    key.verify(b"word", &issued.sign(b"word")).unwrap();
    assert!(key.verify(b"other word", &issued.sign(b"word")).is_err());

    // Another node's certificate under this name.
    let other = authority.issue("sw-1/4", HOUR).unwrap();
    let pem = other.files().into_iter().find(|(name, _)| *name == "node.crt").unwrap().1;
    fs::write(at.join("node.crt"), pem).unwrap();
    assert!(Identity::load(&at).is_err());
}

#[test]
fn a_key_that_others_could_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create_at(&dir.path().join("pki")).unwrap();
    let at = dir.path().join("node");
    authority.issue("a", HOUR).unwrap().store(&at).unwrap();
    for name in ["node.key", "ring.json"] {
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(0o640)).unwrap();
        let error = Identity::load(&at).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        fs::set_permissions(at.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    Identity::load(&at).unwrap();
    fs::set_permissions(dir.path().join("pki/ca.key"), fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(Authority::open_at(&dir.path().join("pki")), Err(PkiError::Exposed { .. })));
}

#[test]
fn only_what_the_authority_issued_and_only_now_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::open_or_create_at(&dir.path().join("ours")).unwrap();
    let theirs = Authority::open_or_create_at(&dir.path().join("theirs")).unwrap();
    let day = 24 * 3600;
    let good = ours.issue("a", HOUR).unwrap();
    let check = |identity: &Identity| good.trust().check(identity.cert(), now()).map(|shown| shown.node_id);
    assert_eq!(check(&good), Ok("a".to_owned()));
    assert_eq!(check(&theirs.issue("a", HOUR).unwrap()), Err(CertFault::Foreign));
    assert_eq!(check(&ours.issue_between("a", now() - 2 * day, now() - day).unwrap()), Err(CertFault::Expired));
    assert_eq!(check(&ours.issue_between("a", now() + day, now() + 2 * day).unwrap()), Err(CertFault::NotYet));
    assert_eq!(good.trust().check(&good.trust().cas()[0], now()), Err(CertFault::Foreign), "the authority is no node");
    for at in 0..good.cert().len() {
        let mut forged = good.cert().to_vec();
        forged[at] ^= 1;
        assert!(good.trust().check(&forged, now()).is_err(), "byte {at} can be changed");
    }

    let revoked = ours.issued().unwrap()[0].clone();
    assert_eq!(revoked.node_id, "a");
    ours.revoke(&[revoked.serial]).unwrap();
    let later = ours.issue("b", HOUR).unwrap();
    assert_eq!(later.trust().check(good.cert(), now()), Err(CertFault::Revoked));
    assert_eq!(later.trust().check(later.cert(), now()).unwrap().node_id, "b");
    let at = dir.path().join("b");
    later.store(&at).unwrap();
    assert_eq!(Identity::load(&at).unwrap().trust().check(good.cert(), now()), Err(CertFault::Revoked));
}

#[test]
fn a_ring_changes_in_steps_that_cut_nobody_off() {
    let mut a = KeyRing::of([1; 32]);
    let mut b = a.clone();
    let old = a.primary();
    let fresh = a.add([2; 32]).unwrap();
    assert_eq!(a.add([2; 32]), Ok(fresh), "adding again changes nothing");
    let members = |a: &KeyRing, b: &KeyRing| vec![("a", Some(a.summary())), ("b", Some(b.summary()))];

    let refused = RingSummary::may_use(&a, fresh, members(&a, &b)).unwrap_err();
    assert!(matches!(&refused, RingError::WouldCutOff(who) if who.len() == 1 && who[0].starts_with("b ")), "{refused}");
    assert!(RingSummary::may_use(&a, fresh, [("old", None)]).is_err(), "nobody knows what it has");
    assert!(b.is_behind(&a.summary()) && !a.is_behind(&b.summary()));
    assert!(b.adopt(&a) && !b.adopt(&a) && b == a);
    RingSummary::may_use(&a, fresh, members(&a, &b)).unwrap();

    a.use_key(fresh).unwrap();
    assert!(RingSummary::may_remove(&a, old, members(&a, &b)).is_err(), "b still seals with it");
    assert_eq!(a.remove(fresh), Err(RingError::InUse(fresh)));
    b.adopt(&a);
    RingSummary::may_remove(&a, old, members(&a, &b)).unwrap();
    a.remove(old).unwrap();
    b.adopt(&a);
    assert_eq!(b.list().len(), 1);
    assert_eq!(b.remove(old), Err(RingError::Unknown(old)));

    // Two operators at once: everybody ends with the same ring.
    let (mut left, mut right) = (a.clone(), a.clone());
    left.add([3; 32]).unwrap();
    right.add([4; 32]).unwrap();
    let (before_left, before_right) = (left.clone(), right.clone());
    assert_ne!(left.is_behind(&right.summary()), right.is_behind(&left.summary()));
    left.adopt(&before_right);
    right.adopt(&before_left);
    assert_eq!(left, right);
}

#[test]
fn a_ring_survives_its_file_and_its_label_and_is_never_shown() {
    let mut ring = KeyRing::generate().unwrap();
    while ring.list().len() < MAX_KEYS {
        ring.add_fresh().unwrap();
    }
    assert!(matches!(ring.add([9; 32]), Err(RingError::Full)));
    assert_eq!(KeyRing::from_json(ring.to_json().as_bytes()).unwrap(), ring);
    let label = ring.summary().to_string();
    assert!(label.len() <= 96, "it travels in every record: {label}");
    assert_eq!(RingSummary::parse(&label), Some(ring.summary()));
    for odd in ["", "1", "1:", "x:00000000", "1:0000000", "1:0000000g", "1:00000000,"] {
        assert_eq!(RingSummary::parse(odd), None, "{odd}");
    }
    let secret = to_hex(ring.get(ring.primary()).unwrap());
    assert!(!format!("{ring:?}").contains(&secret) && ring.to_json().contains(&secret));
    for cut in 0..ring.to_json().len() {
        let error = KeyRing::from_json(&ring.to_json().as_bytes()[..cut]).unwrap_err().to_string();
        assert!(!error.contains(&secret[..8]), "{error}");
    }
}

#[test]
fn what_the_login_side_lays_beside_a_key_is_in_force_at_the_next_look() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::open_or_create_at(&dir.path().join("ours")).unwrap();
    let at = dir.path().join("a");
    ours.issue("a", HOUR).unwrap().store(&at).unwrap();
    let handle = IdentityHandle::new(Identity::load(&at).unwrap());
    let mut follower = Follower::new(handle.clone());
    assert!(follower.look().unwrap().is_none(), "nothing has changed");
    let fresh = ours.issue("a", 2 * HOUR).unwrap();
    fresh.store(&at).unwrap();
    assert_eq!(follower.look().unwrap().unwrap().cert(), fresh.cert());
    assert_eq!(handle.current().expires(), fresh.expires());
    assert!(follower.look().unwrap().is_none());

    // Half of a change, and what is somebody else's, leave what is in force.
    let other = ours.issue("b", HOUR).unwrap();
    std::fs::write(at.join("node.crt"), pem_of(&other)).unwrap();
    assert!(follower.look().is_err());
    other.store(&at).unwrap();
    assert!(follower.look().unwrap_err().to_string().contains("another node's"));
    assert_eq!(handle.current().cert(), fresh.cert());
    fresh.store(&at).unwrap();
    assert!(follower.look().unwrap().is_none(), "the same again is no news");

    // While an authority is replaced, certificates of both are good, whoever issued one's own.
    let next = Authority::open_or_create_at(&dir.path().join("next")).unwrap();
    let both = [next.dir(), ours.dir()].map(|dir| std::fs::read_to_string(dir.join("ca.crt")).unwrap()).concat();
    std::fs::write(at.join("ca.crt"), &both).unwrap();
    let believed = follower.look().unwrap().unwrap();
    for issued in [&other, &next.issue("c", HOUR).unwrap()] {
        believed.trust().check(issued.cert(), now()).unwrap();
    }
    assert_eq!(believed.trust().authority_keys().count(), 2);
    let again = dir.path().join("again");
    believed.store(&again).unwrap();
    assert_eq!(Identity::load(&again).unwrap().trust().cas().len(), 2, "a copy has both");
}

fn pem_of(identity: &Identity) -> Vec<u8> {
    identity.files().into_iter().find(|(name, _)| *name == "node.crt").unwrap().1
}
