//! What is known of each address, found by hash: a B-tree that is filled in order is half empty.

use std::net::IpAddr;

use hashbrown::HashTable;
use smallvec::SmallVec;

use super::arena::Arena;
use super::cluster::hash;

/// What is known of one address.
#[derive(Debug)]
pub(super) struct Address {
    address: IpAddr,
    /// Pods whose status names it.
    pub claims: SmallVec<[u32; 2]>,
    pub identity: Option<u32>,
}

/// Addresses that have an identity or that a pod claims.
#[derive(Debug, Default)]
pub(super) struct AddressTable {
    known: Arena<Address>,
    by_address: HashTable<u32>,
}

impl AddressTable {
    pub(super) fn len(&self) -> usize {
        self.by_address.len()
    }

    fn find(&self, address: IpAddr) -> Option<u32> {
        self.by_address.find(hash(&address), |slot| self.known[*slot].address == address).copied()
    }

    pub(super) fn get(&self, address: IpAddr) -> Option<&Address> {
        self.find(address).map(|slot| &self.known[slot])
    }

    pub(super) fn get_mut(&mut self, address: IpAddr) -> Option<&mut Address> {
        let slot = self.find(address)?;
        self.known.get_mut(slot)
    }

    /// The entry of an address, made where there is none.
    pub(super) fn entry(&mut self, address: IpAddr) -> &mut Address {
        let slot = self.find(address).unwrap_or_else(|| {
            let slot = self.known.insert(Address { address, claims: SmallVec::new(), identity: None });
            let known = &self.known;
            self.by_address.insert_unique(hash(&address), slot, |slot| hash(&known[*slot].address));
            slot
        });
        &mut self.known[slot]
    }

    pub(super) fn remove(&mut self, address: IpAddr) {
        let known = &self.known;
        if let Ok(entry) = self.by_address.find_entry(hash(&address), |slot| known[*slot].address == address)
        {
            let (slot, _) = entry.remove();
            self.known.remove(slot);
        }
    }

    /// All of them, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (IpAddr, &Address)> {
        self.known.iter().map(|(_, known)| (known.address, known))
    }
}
