//! The ring of gossip keys: what it is, who has it, and changes of it that cut nobody off.

use drover_proto::router as pb;
use drover_service::pki::{KeyId, KeyRing, RING_LABEL, RingSummary};
use drover_types::{ErrorCode, Failure};

use super::Service;
use crate::core::input::Input;
use crate::registry::Registry;
use crate::shell::{RingChange, sent};
use crate::store::Command;

/// A node that lives, and what it says of its ring.
struct Holder<'a> {
    id: &'a str,
    keys: Vec<KeyId>,
    primary: Option<KeyId>,
}

impl Service {
    pub(super) async fn keys(&self) -> Result<pb::ListKeysResponse, Failure> {
        let ring = self.ring.read().await?;
        Ok(listed(&ring, &self.shared.registry.load()))
    }

    pub(super) async fn add_key(&self, key: &[u8]) -> Result<pb::AddKeyResponse, Failure> {
        let key = match key {
            [] => None,
            key => Some(key.try_into().map_err(|_| {
                Failure::new(ErrorCode::InvalidRequest, format!("a key has 32 bytes, not {}", key.len()))
            })?),
        };
        let (ring, id) = self.change_ring(RingChange::Add(key)).await?;
        Ok(pb::AddKeyResponse { ring: Some(ring), key_id: id.into() })
    }

    pub(super) async fn use_key(&self, id: u32, force: bool) -> Result<pb::UseKeyResponse, Failure> {
        let id = key_id(id)?;
        if !force {
            let ring = self.ring.read().await?;
            may_use(&ring, id, &holders(&ring, &self.shared.registry.load()))?;
        }
        let (ring, _) = self.change_ring(RingChange::Use(id)).await?;
        Ok(pb::UseKeyResponse { ring: Some(ring) })
    }

    pub(super) async fn remove_key(&self, id: u32, force: bool) -> Result<pb::RemoveKeyResponse, Failure> {
        let id = key_id(id)?;
        if !force {
            let ring = self.ring.read().await?;
            may_remove(&ring, id, &holders(&ring, &self.shared.registry.load()))?;
        }
        let (ring, _) = self.change_ring(RingChange::Remove(id)).await?;
        Ok(pb::RemoveKeyResponse { ring: Some(ring) })
    }

    /// Changes the file first: what cannot be kept must not be sent.
    async fn change_ring(&self, change: RingChange) -> Result<(pb::ListKeysResponse, KeyId), Failure> {
        let (ring, id) = self.ring.change(change).await?;
        self.store.tell(Command::Happened(Input::Ring(sent(&ring)))).await;
        Ok((listed(&ring, &self.shared.registry.load()), id))
    }
}

fn key_id(id: u32) -> Result<KeyId, Failure> {
    KeyId::try_from(id).map_err(|_| Failure::new(ErrorCode::InvalidRequest, format!("{id} is no key id")))
}

/// Every member that is up, with the keys that its record names, or that its worker said it has.
fn holders<'a>(ring: &KeyRing, registry: &'a Registry) -> Vec<Holder<'a>> {
    let up = registry.members.values().filter(|member| matches!(member.state.as_str(), "alive" | "suspect"));
    let holder = |member: &'a std::sync::Arc<pb::Member>| {
        let summary = member.labels.get(RING_LABEL).and_then(|label| RingSummary::parse(label));
        let said = || {
            let place = (member.swarm_id.parse().ok()?, member.node_index?);
            registry.rings.get(&place)
        };
        let (keys, primary) = match (summary, said()) {
            (Some(summary), _) => {
                let having = |id: &KeyId| ring.get(*id).is_some_and(|key| summary.has(key));
                let using = |id: &KeyId| ring.get(*id).is_some_and(|key| summary.seals_with(key));
                (ring.ids().filter(having).collect(), ring.ids().find(using))
            }
            (None, Some(said)) => (said.ids.clone(), Some(said.primary)),
            (None, None) => (Vec::new(), None),
        };
        Holder { id: &member.node_id, keys, primary }
    };
    up.map(holder).collect()
}

fn listed(ring: &KeyRing, registry: &Registry) -> pb::ListKeysResponse {
    let holders = holders(ring, registry);
    let keys = ring.list().into_iter().map(|key| pb::RingKey {
        key_id: key.id.into(),
        fingerprint: key.fingerprint,
        in_use: key.primary,
        nodes: holders.iter().filter(|holder| holder.keys.contains(&key.id)).count() as u32,
        nodes_using: holders.iter().filter(|holder| holder.primary == Some(key.id)).count() as u32,
        missing: lacking(&holders, |holder| holder.keys.contains(&key.id)),
    });
    pb::ListKeysResponse { keys: keys.collect(), revision: ring.revision(), nodes: holders.len() as u32 }
}

fn lacking(holders: &[Holder<'_>], fine: impl Fn(&Holder<'_>) -> bool) -> Vec<String> {
    holders.iter().filter(|holder| !fine(holder)).map(|holder| holder.id.to_owned()).collect()
}

fn known(ring: &KeyRing, id: KeyId) -> Result<(), Failure> {
    if ring.get(id).is_some() {
        return Ok(());
    }
    Err(Failure::new(ErrorCode::InvalidRequest, format!("the ring has no key {id:02x}"))
        .hint("`drover keys list` shows those that it has"))
}

/// Whoever does not have the key could not read the others any more.
fn may_use(ring: &KeyRing, id: KeyId, holders: &[Holder<'_>]) -> Result<(), Failure> {
    known(ring, id)?;
    would_cut_off(id, "do not have it yet", &lacking(holders, |holder| holder.keys.contains(&id)))
}

/// Whoever still seals with the key could not be read any more.
fn may_remove(ring: &KeyRing, id: KeyId, holders: &[Holder<'_>]) -> Result<(), Failure> {
    known(ring, id)?;
    if ring.primary() == id {
        return Err(Failure::new(ErrorCode::InvalidRequest, format!("key {id:02x} is in use"))
            .hint("use another one first: `drover keys use ID`"));
    }
    let moved_on = |holder: &Holder<'_>| {
        holder.primary.is_some_and(|primary| primary != id) && holder.keys.contains(&ring.primary())
    };
    would_cut_off(id, "still seal with it", &lacking(holders, moved_on))
}

fn would_cut_off(id: KeyId, what: &str, lacking: &[String]) -> Result<(), Failure> {
    if lacking.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = lacking.iter().take(3).map(String::as_str).collect();
    let more = if lacking.len() > 3 { format!(" and {} more", lacking.len() - 3) } else { String::new() };
    let message =
        format!("key {id:02x} would cut off {} of the nodes that {what}: {}{more}", lacking.len(), names.join(", "));
    Err(Failure::new(ErrorCode::NotAllowed, message).hint(
        "`drover keys list` shows how many have it; try again in a moment, or add --force when they are gone for good",
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use super::*;
    use crate::core::ring::RingSaid;

    fn registry(members: Vec<(&str, &str, Option<String>)>, said: Option<(u32, RingSaid)>) -> Registry {
        let member = |(id, state, ring): (&str, &str, Option<String>)| {
            let member = pb::Member {
                node_id: id.into(),
                swarm_id: "s".into(),
                node_index: id.rsplit('/').next().and_then(|index| index.parse().ok()),
                state: state.into(),
                labels: ring.map(|ring| (RING_LABEL.to_owned(), ring)).into_iter().collect(),
                ..pb::Member::default()
            };
            (id.to_owned(), Arc::new(member))
        };
        Registry {
            members: Arc::new(members.into_iter().map(member).collect()),
            rings: Arc::new(
                said.map(|(node, said)| (("s".parse().unwrap(), node), said)).into_iter().collect::<BTreeMap<_, _>>(),
            ),
            ..Registry::default()
        }
    }

    #[test]
    fn a_key_is_used_when_all_who_live_have_it_and_removed_when_none_of_them_seals_with_it() {
        let mut ring = KeyRing::of([1; 32]);
        let old = ring.primary();
        let before = ring.summary().to_string();
        let new = ring.add([2; 32]).unwrap();
        let after = ring.summary().to_string();
        // One has it by its record, one by its word, one not yet, and one that is dead does not count.
        let said = RingSaid { ids: vec![old, new], primary: old };
        let at = |third: &str| {
            let members = vec![
                ("s/0", "alive", Some(after.clone())),
                ("s/1", "suspect", None),
                ("s/2", "alive", Some(third.to_owned())),
                ("s/3", "dead", Some(before.clone())),
            ];
            registry(members, Some((1, said.clone())))
        };
        let behind = at(&before);
        let failure = may_use(&ring, new, &holders(&ring, &behind)).unwrap_err();
        assert!(failure.code == ErrorCode::NotAllowed && failure.message.contains("s/2"), "{failure}");
        assert!(!failure.message.contains("s/1") && !failure.message.contains("s/3"), "{failure}");
        let list = listed(&ring, &behind);
        let counts: BTreeMap<u32, (u32, u32)> =
            list.keys.iter().map(|k| (k.key_id, (k.nodes, k.nodes_using))).collect();
        assert_eq!((counts[&old.into()], counts[&new.into()], list.nodes), ((3, 3), (2, 0), 3));

        may_use(&ring, new, &holders(&ring, &at(&after))).unwrap();
        ring.use_key(new).unwrap();
        let failure = may_remove(&ring, old, &holders(&ring, &at(&after))).unwrap_err();
        assert!(failure.message.contains("still seal with it"), "{failure}");
        assert!(may_remove(&ring, new, &[]).unwrap_err().message.contains("in use"));
        assert!(may_use(&ring, new.wrapping_add(1), &[]).is_err() || ring.get(new.wrapping_add(1)).is_some());
        let all = ring.summary().to_string();
        let moved = registry(vec![("s/0", "alive", Some(all))], None);
        may_remove(&ring, old, &holders(&ring, &moved)).unwrap();
    }
}
