//! The compiler asked for single elements, as they were at the last commit.

use std::convert::Infallible;
use std::net::IpAddr;

use super::addresses::range_at;
use super::{Compiler, Dirty, Membership};
use crate::policy::lookup::{Direction, Elements, PortLookup};
use crate::ports::Proto;
use crate::ruleset::{AddrRange, ClassId, IdentityId, ProfileId};

impl Compiler {
    /// Whether changes were taken in that no commit has seen yet.
    #[must_use]
    pub fn has_uncommitted(&self) -> bool {
        self.dirty != Dirty::default()
    }
}

/// Numbers are searched for: these are questions of people.
impl Elements for &Compiler {
    type Error = Infallible;

    fn class(&mut self, direction: Direction, subject: IpAddr) -> Result<Option<ClassId>, Infallible> {
        let local = self.leased.get(&subject).and_then(|endpoint| self.locals.get(endpoint));
        let Some(local) = local.filter(|local| !local.fresh) else { return Ok(None) };
        Ok(match local.membership(direction) {
            Membership::Open => None,
            Membership::DenyAll => Some(ClassId::DENY_ALL),
            Membership::In(class) => Some(self.classes[class].number),
        })
    }

    fn exact(&mut self, peer: IpAddr) -> Result<Option<IdentityId>, Infallible> {
        let identity = self.addresses.get(peer).and_then(|known| known.identity);
        Ok(identity.map(|slot| self.identities[slot].number))
    }

    fn range(&mut self, peer: IpAddr) -> Result<Option<(AddrRange, IdentityId)>, Infallible> {
        let range = range_at(&self.ranges, peer);
        Ok(range.map(|range| (range.range, self.identities[range.identity].number)))
    }

    fn pair(
        &mut self,
        direction: Direction,
        class: ClassId,
        identity: IdentityId,
    ) -> Result<Option<ProfileId>, Infallible> {
        let of_number =
            |entry: &(u32, &super::Class)| entry.1.number == class && entry.1.key.direction == direction;
        let Some((_, class)) = self.classes.iter().find(of_number) else { return Ok(None) };
        let of = match identity {
            IdentityId::ANY => None,
            number => match self.identities.iter().find(|(_, identity)| identity.number == number) {
                Some((slot, _)) => Some(slot),
                None => return Ok(None),
            },
        };
        Ok(class.pairs.get(&of).map(|profile| self.profiles[*profile].number))
    }

    fn port(&mut self, profile: ProfileId, proto: Proto, port: u16) -> Result<PortLookup, Infallible> {
        let profile = self.profiles.iter().find(|(_, own)| own.number == profile);
        Ok(profile.map_or(PortLookup::Deny, |(_, profile)| PortLookup::of(&profile.allowed, proto, port)))
    }
}
