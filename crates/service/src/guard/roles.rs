//! Who may do what. Pure.

use std::collections::{BTreeMap, BTreeSet};

use drover_config::SecurityConfig;
use drover_types::{ErrorCode, Failure};

/// What a user other than the owner may be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// See swarms, prompts, events and sessions.
    Read,
    /// Send prompts.
    Inject,
    /// Launch swarms.
    Launch,
    /// End swarms.
    Terminate,
    /// See and answer approvals.
    Approve,
    /// Have models called with the owner's keys and money.
    Dispatch,
}

impl Role {
    /// Those of the router.
    pub const OF_ROUTER: &'static [Self] = &[Self::Read, Self::Inject, Self::Launch, Self::Terminate, Self::Approve];
    /// Those of the dispatcher.
    pub const OF_DISPATCHER: &'static [Self] = &[Self::Dispatch];

    /// Its name in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Inject => "inject",
            Self::Launch => "launch",
            Self::Terminate => "terminate",
            Self::Approve => "approve",
            Self::Dispatch => "dispatch",
        }
    }

    fn uids(self, security: &SecurityConfig) -> &[u32] {
        let roles = &security.roles;
        match self {
            Self::Read => &roles.read,
            Self::Inject => &roles.inject,
            Self::Launch => &roles.launch,
            Self::Terminate => &roles.terminate,
            Self::Approve => &roles.approve,
            Self::Dispatch => &roles.dispatch,
        }
    }
}

/// What a call asks of its caller.
#[derive(Debug, Clone, Copy)]
pub enum Needs {
    /// Nothing beyond being let in.
    Nothing,
    /// One of these roles.
    OneOf(&'static [Role]),
    /// To be the owner, or a user who may do everything.
    Everything,
}

/// Everybody whom a daemon lets in.
#[derive(Debug)]
pub(super) struct People {
    daemon: &'static str,
    roles: &'static [Role],
    owners: BTreeSet<u32>,
    guests: BTreeMap<u32, BTreeSet<Role>>,
}

impl People {
    /// The owner, and whom the configuration names for one of the daemon's roles.
    pub(super) fn new(daemon: &'static str, roles: &'static [Role], owner: u32, security: &SecurityConfig) -> Self {
        let mut owners: BTreeSet<u32> = security.allow_uids.iter().copied().collect();
        owners.insert(owner);
        let mut guests = BTreeMap::<u32, BTreeSet<Role>>::new();
        for role in roles {
            for uid in role.uids(security).iter().filter(|uid| !owners.contains(uid)) {
                guests.entry(*uid).or_default().insert(*role);
            }
        }
        Self { daemon, roles, owners, guests }
    }

    /// Users who have roles and no more.
    pub(super) fn guests(&self) -> BTreeSet<u32> {
        self.guests.keys().copied().collect()
    }

    /// Whether this user may, or which role is missing.
    pub(super) fn may(&self, uid: u32, needs: Needs) -> Result<(), Failure> {
        if self.owners.contains(&uid) {
            return Ok(());
        }
        let has = self.guests.get(&uid);
        let names = |roles: &[Role]| roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ");
        let missing = match needs {
            Needs::Nothing if has.is_some() => return Ok(()),
            Needs::OneOf(roles) if roles.iter().any(|role| has.is_some_and(|has| has.contains(role))) => return Ok(()),
            Needs::OneOf(roles) => names(roles),
            Needs::Nothing => names(self.roles),
            Needs::Everything => {
                return Err(Failure::new(
                    ErrorCode::NotAllowed,
                    format!("this is for the owner of the {}, and user {uid} has roles only", self.daemon),
                )
                .hint("its owner can do it, or list the user in security.allow_uids"));
            }
        };
        Err(Failure::new(ErrorCode::NotAllowed, format!("user {uid} lacks the role {missing}")).hint(format!(
            "the owner of the {0} can give it: security.roles.{1} in its configuration, then a restart of the {0}",
            self.daemon,
            missing.split(' ').next().unwrap_or_default()
        )))
    }
}

#[cfg(test)]
mod tests {
    use drover_config::RolesConfig;

    use super::*;

    #[test]
    fn roles_add_up_and_the_owner_needs_none() {
        let roles = RolesConfig { read: vec![7, 8], inject: vec![7, 9], dispatch: vec![3], ..RolesConfig::default() };
        let security = SecurityConfig { allow_uids: vec![6, 9], roles, ..SecurityConfig::default() };
        let people = People::new("router", Role::OF_ROUTER, 5, &security);
        let may = |uid, needs| people.may(uid, needs).map_err(|failure| failure.message);
        for uid in [5, 6, 9] {
            for needs in [Needs::Nothing, Needs::OneOf(&[Role::Approve]), Needs::Everything] {
                assert_eq!(may(uid, needs), Ok(()), "{uid}");
            }
        }
        assert_eq!(people.guests(), BTreeSet::from([7, 8]), "who may do everything is no guest");
        assert_eq!((may(7, Needs::OneOf(&[Role::Read])), may(7, Needs::OneOf(&[Role::Inject]))), (Ok(()), Ok(())));
        assert_eq!(may(8, Needs::OneOf(&[Role::Inject])), Err("user 8 lacks the role inject".to_owned()));
        assert_eq!(may(8, Needs::OneOf(&[Role::Read, Role::Approve])), Ok(()));
        assert!(may(7, Needs::Everything).unwrap_err().contains("for the owner"));
        assert!(may(4, Needs::Nothing).is_err() && may(3, Needs::Nothing).is_err(), "strangers to the router");
        let spenders = People::new("dispatcher", Role::OF_DISPATCHER, 5, &security);
        assert_eq!(spenders.guests(), BTreeSet::from([3]));
        assert!(
            spenders.may(7, Needs::OneOf(&[Role::Dispatch])).is_err() && spenders.may(6, Needs::Everything).is_ok()
        );
    }
}
