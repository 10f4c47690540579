//! What a merge (see [`crate::merge`]) needs of the layers in memory.

use std::ops::Range;
use std::sync::Arc;

use holdfast_io::AlignedBuf;
use holdfast_storage_core::ids::BLOCK_BYTES;

use super::DataPath;
use super::space::Backed;
use super::stack::Need;
use super::switch::Gate;
use crate::disk::DiskFile;
use crate::error::StoreError;
use crate::layout::TablePage;
use crate::sums::Summer;
use crate::tables::Entry;

/// A layer as a merge sees it at the beginning of a step.
#[derive(Clone)]
pub struct LayerHandle {
    /// Names its file.
    pub number: u32,
    /// Its file.
    pub file: DiskFile,
    /// Its checksums.
    pub summer: Summer,
    /// Blocks from here on are absent.
    pub blocks: u64,
    /// Blocks below it were moved, durably.
    pub moved_below: u64,
    /// Blocks below it were copied.
    pub copied_below: u64,
}

impl DataPath {
    /// A layer.
    pub fn layer_handle(&self, number: u32) -> Option<LayerHandle> {
        let mut state = self.lock();
        state.stack.by_number(number).map(|layer| LayerHandle {
            number,
            file: layer.file.clone(),
            summer: layer.summer,
            blocks: layer.blocks,
            moved_below: layer.moved_below,
            copied_below: layer.copied_below,
        })
    }

    /// The lower layer of a merge gets blocks as far up as the upper one has them.
    pub fn lengthened(&self, number: u32, blocks: u64) {
        if let Some(layer) = self.lock().stack.by_number(number) {
            layer.blocks = layer.blocks.max(blocks);
        }
    }

    /// The layer's blocks below `block` are in the layer beneath too, but not durably.
    pub fn set_copied_below(&self, number: u32, block: u64) {
        if let Some(layer) = self.lock().stack.by_number(number) {
            layer.copied_below = block;
        }
    }

    /// The layer's blocks below `block` are in the layer beneath, durably; gives the bound before.
    pub fn set_moved_below(&self, number: u32, block: u64) -> u64 {
        match self.lock().stack.by_number(number) {
            Some(layer) => {
                layer.copied_below = block;
                std::mem::replace(&mut layer.moved_below, block)
            }
            None => block,
        }
    }

    /// A layer's entries. Blocks while their pages are read.
    pub fn entries_now(self: &Arc<Self>, number: u32, range: Range<u64>) -> Result<Vec<Entry>, StoreError> {
        self.with_layer_now(number, range.clone(), |layer| {
            range.clone().map(|block| layer.tables.entry(block)).collect()
        })
    }

    /// Changes entries of a frozen layer, which only a merge does. Blocks while their pages are read.
    pub fn set_entries(self: &Arc<Self>, number: u32, entries: &[(u64, Entry)]) -> Result<(), StoreError> {
        let (Some((first, _)), Some((last, _))) = (entries.first(), entries.last()) else { return Ok(()) };
        self.with_layer_now(number, *first..last + 1, |layer| {
            for (block, entry) in entries {
                layer.tables.set(*block, *entry);
            }
        })
    }

    /// Copies of a frozen layer's changed pages; they stay changed until [`DataPath::tables_saved`].
    pub fn dirty_pages(&self, number: u32) -> Vec<(TablePage, AlignedBuf)> {
        self.lock().stack.by_number(number).map(|layer| layer.tables.dirty_pages()).unwrap_or_default()
    }

    /// These pages are on the disk as they are in memory.
    pub fn tables_saved(&self, number: u32, pages: impl Iterator<Item = TablePage>) {
        if let Some(layer) = self.lock().stack.by_number(number) {
            layer.tables.saved(pages);
        }
    }

    /// The lower layer stands for both.
    pub fn merged(&self, lower: u32, upper: u32) {
        let mut state = self.lock();
        let Some(gone) = state.stack.remove(upper) else { return };
        if let Some(layer) = state.stack.by_number(lower) {
            layer.snapshot = gone.snapshot;
            layer.blocks = gone.blocks;
        }
    }

    fn with_layer_now<T>(
        self: &Arc<Self>,
        number: u32,
        range: Range<u64>,
        work: impl Fn(&mut super::Layer) -> T,
    ) -> Result<T, StoreError> {
        loop {
            let missing: Vec<(u32, TablePage)> = {
                let mut state = self.lock();
                let Some(layer) = state.stack.by_number(number) else {
                    return Err(StoreError::Closed(self.replica));
                };
                let missing: Vec<TablePage> = layer.missing(range.clone(), Need::Entries).collect();
                if missing.is_empty() {
                    return Ok(work(layer));
                }
                missing.into_iter().map(|page| (number, page)).collect()
            };
            let (sender, receiver) = std::sync::mpsc::sync_channel(1);
            self.load_pages(missing, move |loaded| {
                let _ = sender.send(loaded);
            });
            receiver.recv().unwrap_or(Err(StoreError::Closed(self.replica)))?;
        }
    }
}

impl Gate {
    /// The lower layer has everything of the top, durably, and takes the writes from now on.
    pub fn pop(&self, lower: u32, upper: u32) {
        self.path().merged(lower, upper);
        let mut state = self.path().lock();
        let (layered, blocks) = (state.stack.is_layered(), self.path().size_bytes() / BLOCK_BYTES);
        let top = state.stack.top_mut();
        assert!(top.number == lower && top.blocks == blocks, "layer {lower} became the top");
        state.shadow.set_layer(lower);
        state.backed = Backed::new(layered);
    }
}
