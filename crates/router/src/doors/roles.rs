//! Who may do what. Pure.

use std::collections::{BTreeMap, BTreeSet};

use drover_config::SecurityConfig;
use drover_types::{ErrorCode, Failure};

/// What a user other than the owner may be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    Read,
    Inject,
    Launch,
    Terminate,
    Approve,
}

impl Role {
    pub(crate) const ALL: [Self; 5] = [Self::Read, Self::Inject, Self::Launch, Self::Terminate, Self::Approve];

    /// Its name in the configuration.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Inject => "inject",
            Self::Launch => "launch",
            Self::Terminate => "terminate",
            Self::Approve => "approve",
        }
    }
}

/// What a call asks of its caller.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Needs {
    /// Nothing beyond being let in.
    Nothing,
    /// One of these roles.
    OneOf(&'static [Role]),
    /// To be the owner, or a user who may do everything.
    Everything,
}

/// Everybody who is let in.
#[derive(Debug)]
pub(crate) struct People {
    owners: BTreeSet<u32>,
    guests: BTreeMap<u32, BTreeSet<Role>>,
}

impl People {
    /// The owner, and whom the configuration names.
    pub(crate) fn new(owner: u32, security: &SecurityConfig) -> Self {
        let mut owners: BTreeSet<u32> = security.allow_uids.iter().copied().collect();
        owners.insert(owner);
        let mut guests = BTreeMap::<u32, BTreeSet<Role>>::new();
        for role in Role::ALL {
            let roles = &security.roles;
            let uids = match role {
                Role::Read => &roles.read,
                Role::Inject => &roles.inject,
                Role::Launch => &roles.launch,
                Role::Terminate => &roles.terminate,
                Role::Approve => &roles.approve,
            };
            for uid in uids.iter().filter(|uid| !owners.contains(uid)) {
                guests.entry(*uid).or_default().insert(role);
            }
        }
        Self { owners, guests }
    }

    /// Users who have roles and no more.
    pub(crate) fn guests(&self) -> BTreeSet<u32> {
        self.guests.keys().copied().collect()
    }

    /// Whether this user may, or which role is missing.
    pub(crate) fn may(&self, uid: u32, needs: Needs) -> Result<(), Failure> {
        if self.owners.contains(&uid) {
            return Ok(());
        }
        let has = self.guests.get(&uid);
        let missing = match needs {
            Needs::Nothing if has.is_some() => return Ok(()),
            Needs::OneOf(roles) if roles.iter().any(|role| has.is_some_and(|has| has.contains(role))) => return Ok(()),
            Needs::OneOf(roles) => roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or "),
            Needs::Nothing => Role::ALL.map(Role::as_str).join(" or "),
            Needs::Everything => {
                return Err(Failure::new(
                    ErrorCode::NotAllowed,
                    format!("this is for the owner of the router, and user {uid} has roles only"),
                )
                .hint("its owner can do it, or list the user in security.allow_uids"));
            }
        };
        Err(Failure::new(ErrorCode::NotAllowed, format!("user {uid} lacks the role {missing}")).hint(format!(
            "the owner of the router can give it: security.roles.{} in its configuration, then a restart of the router",
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
        let roles = RolesConfig { read: vec![7, 8], inject: vec![7, 9], ..RolesConfig::default() };
        let people = People::new(5, &SecurityConfig { allow_uids: vec![6, 9], roles, ..SecurityConfig::default() });
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
        assert!(may(4, Needs::Nothing).is_err(), "a stranger");
    }
}
