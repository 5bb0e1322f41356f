//! The certificate authority of an instance: made when it is first needed, kept in the state directory, never sent anywhere.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ED25519, RevokedCertParams,
    SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use webpki::{BorrowedCertRevocationList, CertRevocationList};

use super::files::{self, damaged, failed};
use super::identity::{Identity, Parts, read_cas};
use super::{ClusterId, KeyRing, PkiError, Trust, from_hex, name, random, to_hex};
use crate::state_dir::StateDir;

const CA_KEY: &str = "ca.key";
pub(super) const CA_CERT: &str = "ca.crt";
pub(super) const RING: &str = "ring.json";
pub(super) const REVOKED: &str = "revoked.crl";
const INSTANCE: &str = "instance.json";
const ISSUED: &str = "issued.jsonl";

const DAY: u64 = 24 * 3600;
/// The authority outlives every swarm; who wants another one starts another instance.
const CA_VALID: u64 = 20 * 365 * DAY;
/// A certificate is valid from a day before it was made: a node's clock may be behind, and says so elsewhere.
const BACKDATE: u64 = DAY;

/// What the certificate library takes for a moment; its type has no name here.
macro_rules! at {
    ($unix_seconds:expr) => {
        date_time_ymd(1970, 1, 1) + Duration::from_secs($unix_seconds)
    };
}

/// What is remembered of an issued certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issued {
    /// Serial number in hexadecimal.
    pub serial: String,
    /// Whose it is.
    pub node_id: String,
    /// When it was issued, in seconds of Unix time.
    pub issued: u64,
    /// When its time is over.
    pub expires: u64,
}

#[derive(Serialize, Deserialize)]
struct Instance {
    v: u32,
    cluster_id: String,
}

/// The authority of an instance. Whoever can read its directory can be every node of the instance.
pub struct Authority {
    dir: PathBuf,
    cluster_id: ClusterId,
    cas: Vec<CertificateDer<'static>>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// The authority of the instance, made now when there is none.
    pub fn open_or_create(state: &StateDir) -> Result<Self, PkiError> {
        Self::open_or_create_at(&state.path().join("pki"))
    }

    /// The authority in that directory, made now when there is none.
    pub fn open_or_create_at(dir: &Path) -> Result<Self, PkiError> {
        if !dir.join(INSTANCE).exists() {
            Self::create(dir)?;
        }
        Self::open_at(dir)
    }

    /// The authority in that directory.
    pub fn open_at(dir: &Path) -> Result<Self, PkiError> {
        files::private_dir(dir)?;
        let path = dir.join(INSTANCE);
        let instance: Instance =
            serde_json::from_slice(&files::read(&path)?).map_err(|error| damaged(&path, error.to_string()))?;
        let cluster_id = from_hex(&instance.cluster_id).and_then(|bytes| ClusterId::try_from(bytes).ok());
        let cluster_id = cluster_id.ok_or_else(|| damaged(&path, "the cluster id is not 16 bytes"))?;
        let cas = read_cas(&dir.join(CA_CERT))?;
        let path = dir.join(CA_KEY);
        let key = PrivatePkcs8KeyDer::from_pem_slice(&files::read_secret(&path)?)
            .map_err(|error| damaged(&path, error.to_string()))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &PKCS_ED25519)
            .map_err(|_| damaged(&path, "it is no Ed25519 key"))?;
        Ok(Self { dir: dir.to_owned(), cluster_id, cas, issuer: Issuer::new(ca_params(&cluster_id), key) })
    }

    /// Makes it beside its place and moves it there whole: of two that do so at once, one wins and both use that one.
    fn create(dir: &Path) -> Result<(), PkiError> {
        let cluster_id: ClusterId = random()?;
        let fresh = dir.with_extension(format!("{}.new", to_hex(&random::<8>()?)));
        files::private_dir(&fresh)?;
        let made = (|| {
            let key = KeyPair::generate_for(&PKCS_ED25519)?;
            let mut params = ca_params(&cluster_id);
            let now = crate::now_us() / 1_000_000;
            params.not_before = at!(now.saturating_sub(BACKDATE));
            params.not_after = at!(now + CA_VALID);
            let ca = params.self_signed(&key)?;
            files::write(&fresh.join(CA_KEY), key.serialize_pem().as_bytes())?;
            files::write(&fresh.join(CA_CERT), ca.pem().as_bytes())?;
            files::write(&fresh.join(RING), KeyRing::generate()?.to_json().as_bytes())?;
            let instance = Instance { v: 1, cluster_id: to_hex(&cluster_id) };
            let path = fresh.join(INSTANCE);
            files::write(&path, &serde_json::to_vec(&instance).map_err(|error| damaged(&path, error.to_string()))?)?;
            match fs::rename(&fresh, dir) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) =>
                {
                    Ok(())
                }
                moved => moved.map_err(failed(dir)),
            }
        })();
        if fresh.exists() {
            let _ = fs::remove_dir_all(&fresh);
        }
        made
    }

    /// Names the instance.
    pub fn cluster_id(&self) -> ClusterId {
        self.cluster_id
    }

    /// Where it is kept.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Signs something that only the login side says, such as who votes first. The message must begin with a text of its own, so
    /// that the signature fits nothing else; no certificate begins with one.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, PkiError> {
        Ok(rcgen::SigningKey::sign(self.issuer.key(), message)?)
    }

    /// An identity for a node, valid from now for that long.
    pub fn issue(&self, node_id: &str, valid_for: Duration) -> Result<Identity, PkiError> {
        let now = crate::now_us() / 1_000_000;
        self.issue_between(node_id, now.saturating_sub(BACKDATE), now.saturating_add(valid_for.as_secs()))
    }

    /// An identity for a node, valid between two moments in seconds of Unix time.
    pub fn issue_between(&self, node_id: &str, from: u64, until: u64) -> Result<Identity, PkiError> {
        name::check(node_id)?;
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut serial: [u8; 16] = random()?;
        // A serial number is positive and has no leading zero.
        serial[0] = serial[0] & 0x7f | 0x40;
        let mut params = CertificateParams::default();
        params.not_before = at!(from);
        params.not_after = at!(until.max(from));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        // The certificate travels in datagrams: nothing is in it that nobody reads.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![
            SanType::URI(name::uri(node_id).try_into()?),
            SanType::DnsName(name::node_domain(node_id).try_into()?),
        ];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let cert = params.signed_by(&key, &self.issuer)?;
        let issued = Issued {
            serial: to_hex(&serial),
            node_id: node_id.to_owned(),
            issued: crate::now_us() / 1_000_000,
            expires: until,
        };
        let path = self.dir.join(ISSUED);
        files::append_line(&path, &serde_json::to_string(&issued).map_err(|error| damaged(&path, error.to_string()))?)?;
        Identity::new(Parts {
            node_id: node_id.to_owned(),
            cluster_id: self.cluster_id,
            expires: until,
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
            cert: cert.der().clone(),
            cas: self.cas.clone(),
            revoked: self.revoked()?,
            ring: self.ring()?,
            dir: None,
        })
    }

    /// Every certificate that was issued, oldest first.
    pub fn issued(&self) -> Result<Vec<Issued>, PkiError> {
        let text = files::read_optional(&self.dir.join(ISSUED))?.unwrap_or_default();
        // A line that was cut off by a full disk is one certificate that cannot be listed, and no reason to list none.
        Ok(text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }

    /// Whom new identities trust.
    pub fn trust(&self) -> Result<Trust, PkiError> {
        let revoked = self.revoked()?;
        Trust::new(self.cas.clone(), revoked.as_deref()).map_err(|fault| PkiError::Tls(fault.to_string()))
    }

    /// The ring that new identities get.
    pub fn ring(&self) -> Result<KeyRing, PkiError> {
        Ok(KeyRing::from_json(&files::read_secret(&self.dir.join(RING))?)?)
    }

    /// Takes over the ring that the nodes have, when it is newer, so that later nodes start with it.
    pub fn adopt_ring(&self, newer: &KeyRing) -> Result<bool, PkiError> {
        let mut ring = self.ring()?;
        let adopted = ring.adopt(newer);
        if adopted {
            files::write(&self.dir.join(RING), ring.to_json().as_bytes())?;
        }
        Ok(adopted)
    }

    /// Writes the list of revoked certificates, signed, for identities that are issued or loaded from now on. The serial
    /// numbers are all that are revoked, in hexadecimal.
    pub fn revoke(&self, serials: &[String]) -> Result<Vec<u8>, PkiError> {
        let now = crate::now_us() / 1_000_000;
        let path = self.dir.join(REVOKED);
        let revoked = serials.iter().map(|serial| {
            let serial = from_hex(serial).ok_or_else(|| damaged(&path, format!("{serial} is no serial number")))?;
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&serial),
                revocation_time: at!(now),
                reason_code: None,
                invalidity_date: None,
            })
        });
        let list = CertificateRevocationListParams {
            this_update: at!(now.saturating_sub(BACKDATE)),
            next_update: at!(now + CA_VALID),
            crl_number: SerialNumber::from_slice(&now.to_be_bytes()),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect::<Result<_, PkiError>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)?;
        files::write(&path, list.pem()?.as_bytes())?;
        Ok(list.der().to_vec())
    }

    /// The same, beside what is revoked already. What was never issued here cannot be.
    pub fn revoke_also(&self, serials: &[String]) -> Result<(), PkiError> {
        let mut all = self.revoked_serials()?;
        all.extend(serials.iter().cloned());
        self.revoke(&all.into_iter().collect::<Vec<_>>()).map(drop)
    }

    /// Serial numbers of the certificates that were issued and revoked.
    pub fn revoked_serials(&self) -> Result<BTreeSet<String>, PkiError> {
        let Some(der) = self.revoked()? else { return Ok(BTreeSet::new()) };
        let path = self.dir.join(REVOKED);
        let list = BorrowedCertRevocationList::from_der(&der).map_err(|error| damaged(&path, error.to_string()))?;
        let list = CertRevocationList::from(list);
        let is_on_it = |issued: &Issued| {
            from_hex(&issued.serial).is_some_and(|serial| matches!(list.find_serial(&serial), Ok(Some(_))))
        };
        Ok(self.issued()?.into_iter().filter(is_on_it).map(|issued| issued.serial).collect())
    }

    /// Puts the list beside an identity, whose daemon has it in force at its next look.
    pub fn lay_revoked(&self, identity: &Path) -> Result<(), PkiError> {
        match files::read_optional(&self.dir.join(REVOKED))? {
            Some(list) => files::write(&identity.join(REVOKED), &list),
            None => Ok(()),
        }
    }

    fn revoked(&self) -> Result<Option<Vec<u8>>, PkiError> {
        read_revoked(&self.dir.join(REVOKED))
    }
}

pub(super) fn read_revoked(path: &Path) -> Result<Option<Vec<u8>>, PkiError> {
    let Some(pem) = files::read_optional(path)? else { return Ok(None) };
    let list = CertificateRevocationListDer::from_pem_slice(&pem).map_err(|error| damaged(path, error.to_string()))?;
    Ok(Some(list.to_vec()))
}

/// The same each time, so that the issuer of a certificate is known without reading the authority's own.
fn ca_params(cluster_id: &ClusterId) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("drover {}", to_hex(&cluster_id[..4])));
    params
}
