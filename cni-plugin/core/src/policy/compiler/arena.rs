//! Things by small numbers that stay with them; a number is used again only after it was given back.

/// Things of one allocation.
const CHUNK: usize = 1024;

/// Things by number. They are kept in chunks: a hundred thousand in one list that grows by doubling take twice the room.
#[derive(Debug)]
pub(in crate::policy) struct Arena<T> {
    /// All but the last are full.
    chunks: Vec<Vec<Option<T>>>,
    free: Vec<u32>,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self { chunks: Vec::new(), free: Vec::new() }
    }
}

/// Where a slot is: its chunk, and its place there.
const fn place(slot: u32) -> (usize, usize) {
    (slot as usize / CHUNK, slot as usize % CHUNK)
}

impl<T> Arena<T> {
    pub(in crate::policy) fn insert(&mut self, item: T) -> u32 {
        if let Some(slot) = self.free.pop() {
            let (chunk, index) = place(slot);
            self.chunks[chunk][index] = Some(item);
            return slot;
        }
        let slot = u32::try_from(self.slots()).expect("four billion objects do not fit in memory");
        match self.chunks.last_mut() {
            Some(chunk) if chunk.len() < CHUNK => chunk.push(Some(item)),
            _ => self.chunks.push(vec![Some(item)]),
        }
        slot
    }

    pub(in crate::policy) fn remove(&mut self, slot: u32) -> Option<T> {
        let (chunk, index) = place(slot);
        let item = self.chunks.get_mut(chunk)?.get_mut(index)?.take()?;
        self.free.push(slot);
        Some(item)
    }

    pub(in crate::policy) fn get(&self, slot: u32) -> Option<&T> {
        let (chunk, index) = place(slot);
        self.chunks.get(chunk)?.get(index)?.as_ref()
    }

    pub(in crate::policy) fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        let (chunk, index) = place(slot);
        self.chunks.get_mut(chunk)?.get_mut(index)?.as_mut()
    }

    pub(in crate::policy) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..).zip(self.chunks.iter().flatten()).filter_map(|(slot, item)| Some((slot, item.as_ref()?)))
    }

    pub(in crate::policy) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        (0..).zip(self.chunks.iter_mut().flatten()).filter_map(|(slot, item)| Some((slot, item.as_mut()?)))
    }

    pub(in crate::policy) fn len(&self) -> usize {
        self.slots() - self.free.len()
    }

    /// Slots, in use or free.
    fn slots(&self) -> usize {
        self.chunks.last().map_or(0, |last| (self.chunks.len() - 1) * CHUNK + last.len())
    }
}

impl<T> std::ops::Index<u32> for Arena<T> {
    type Output = T;

    /// Panics where the slot is empty: a bug of the caller.
    fn index(&self, slot: u32) -> &T {
        self.get(slot).expect("the slot is in use")
    }
}

impl<T> std::ops::IndexMut<u32> for Arena<T> {
    fn index_mut(&mut self, slot: u32) -> &mut T {
        self.get_mut(slot).expect("the slot is in use")
    }
}
