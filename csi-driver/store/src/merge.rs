//! Merges a frozen layer that has no snapshot with the layer above it, in the background.
//!
//! The blocks of the upper layer are moved down, because it usually has few: a snapshot's first layer holds the whole
//! volume, the one above only what was written since. The lower file then takes the upper one's place in the stack. Its
//! own blocks that the upper one has are overwritten; nobody could read them any more.
//!
//! 1. Copy a window of the upper layer's blocks into the lower file. *Crash:* the upper layer still has and shadows them.
//! 2. After some windows, write the lower file's tables and sync it; then make the cursor durable: below it the upper
//!    layer counts as absent. *Crash:* the old cursor or the new one; the blocks between are in both files.
//! 3. Give the space below the cursor in the upper file back. Never before 2, so both files together never hold more than
//!    the blocks once and `CHECKPOINT_BYTES`.
//! 4. When all is moved: replace the manifest by one where the lower file stands for both. *Crash:* the old one, and the
//!    last windows are moved again, or the new one. Then remove the upper file; opening does it after a crash.
//!
//! The layer that takes writes is moved in the same way once it is frozen without a snapshot, below a new one. When it is
//! small enough, all of it is moved at once while writes wait, and the lower file takes the writes from then on.
//!
//! A file that a clone shares (it has another link) is never written: such a merge waits until the other is gone. The
//! lower file decides: whoever shares the upper one shares it too.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_io::AlignedBuf;
use holdfast_storage_core::ids::BLOCK_BYTES;

use crate::data::{DataPath, Gate, LayerHandle};
use crate::error::StoreError;
use crate::layer::{self, layer_path};
use crate::layout::{
    BLOCKS_PER_GROUP, PAGE_BYTES, STATES_PER_PAGE, SUMS_PER_PAGE, TablePage, data_offset, group_of,
    layer_file_bytes, table_areas,
};
use crate::merge_cursor::MergeCursor;
use crate::space::Charge;
use crate::stack_files::StackFiles;
use crate::sums::other_sum;
use crate::tables::{Entry, State, count_allocated};

/// Blocks looked at in one step: one page of checksums.
const WINDOW_BLOCKS: u64 = SUMS_PER_PAGE;
/// Data that is in both files at most. Tests save after each window, so that crashes meet every step.
const CHECKPOINT_BYTES: u64 = if cfg!(test) { 1 } else { 16 << 20 };
/// A top with no more blocks than this is moved at once while writes wait: 2 MiB, some milliseconds.
const MOVED_AT_ONCE_BLOCKS: u64 = if cfg!(test) { 6 } else { 512 };
/// How often one run freezes the top to move it. Writers that fill it faster than it is moved keep it for a later run.
const FREEZES_MAX: u32 = 8;

/// What a step of a merge did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// There is nothing to merge.
    Done,
    /// So many bytes were moved; there may be more.
    Moved(u64),
    /// It cannot go on now: a file is shared, the pool is full, or the top is written too fast.
    Later,
}

/// Merges of one replica.
pub struct Merger {
    stack: Arc<Mutex<StackFiles>>,
    data: Arc<DataPath>,
    freezes: u32,
    /// The lower and the upper layer of the last step.
    pair: Option<(u32, u32)>,
    /// Moved since the last checkpoint.
    unsaved_bytes: u64,
    /// Layer, group and volume size for which tables were reserved last.
    reserved: Option<(u32, u64, u64)>,
    /// What the last group that was looked at has.
    scanned: Option<Scanned>,
}

/// The windows of a group in which a layer has blocks.
struct Scanned {
    layer: u32,
    group: u64,
    /// First blocks, ascending.
    windows: Vec<u64>,
}

impl Merger {
    /// Starts or resumes.
    pub fn new(stack: Arc<Mutex<StackFiles>>, data: Arc<DataPath>) -> Self {
        Self { stack, data, freezes: 0, pair: None, unsaved_bytes: 0, reserved: None, scanned: None }
    }

    /// Does a bounded piece of work under the stack's lock. Blocks.
    pub fn step(&mut self) -> Result<Step, StoreError> {
        if self.data.is_poisoned() {
            return Err(StoreError::Poisoned(self.data.replica()));
        }
        let stack = Arc::clone(&self.stack);
        let mut files = stack.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lower_index) = mergeable(&files)? else {
            let waits = files.manifest.layers.iter().any(|layer| layer.frozen && layer.snapshot.is_none());
            return Ok(if waits { Step::Later } else { Step::Done });
        };
        let upper_entry = &files.manifest.layers[lower_index + 1];
        let (upper_number, upper_frozen) = (upper_entry.number, upper_entry.frozen);
        let lower = self.handle(files.manifest.layers[lower_index].number)?;
        let upper = self.handle(upper_number)?;
        self.begin_pair(&files, &lower, &upper, upper_frozen)?;
        if upper_frozen {
            return self.move_window(&mut files, lower_index, &lower, &upper);
        }
        if self.count_until(&files, &upper, MOVED_AT_ONCE_BLOCKS)? <= MOVED_AT_ONCE_BLOCKS {
            return self.move_top(&mut files, &lower, &upper);
        }
        if self.freezes >= FREEZES_MAX {
            return Ok(Step::Later);
        }
        self.freezes += 1;
        match files.freeze_for_merge() {
            Ok(()) => Ok(Step::Moved(0)),
            Err(StoreError::TooManyLayers { .. } | StoreError::NoSpace(_)) => Ok(Step::Later),
            Err(error) => Err(error),
        }
    }

    /// A merge of the upper layer with one above it may have been under way, and waits for this one now. What it copied into
    /// the upper layer must be on the disk, where this merge looks for it.
    fn begin_pair(
        &mut self,
        files: &StackFiles,
        lower: &LayerHandle,
        upper: &LayerHandle,
        upper_frozen: bool,
    ) -> Result<(), StoreError> {
        let pair = Some((lower.number, upper.number));
        if self.pair == pair {
            return Ok(());
        }
        if upper_frozen && !self.data.dirty_pages(upper.number).is_empty() {
            self.save_lower(files, upper)?;
        }
        self.pair = pair;
        self.unsaved_bytes = 0;
        self.scanned = None;
        Ok(())
    }

    fn move_window(
        &mut self,
        files: &mut StackFiles,
        lower_index: usize,
        lower: &LayerHandle,
        upper: &LayerHandle,
    ) -> Result<Step, StoreError> {
        let from = upper.moved_below.max(upper.copied_below);
        let Some(first) = self.next_window(files, upper, from)? else {
            self.checkpoint(files, lower, upper, upper.blocks)?;
            self.replace_pair(files, lower_index)?;
            return Ok(Step::Moved(0));
        };
        let end = ((first / WINDOW_BLOCKS + 1) * WINDOW_BLOCKS).min(upper.blocks);
        let moved_bytes = match self.copy(files, lower, upper, first, end) {
            Err(StoreError::NoSpace(_)) => {
                // What is saved gives space back; the rest goes on when there is some.
                self.checkpoint(files, lower, upper, first)?;
                return Ok(Step::Later);
            }
            other => other?,
        };
        self.unsaved_bytes += moved_bytes;
        if self.unsaved_bytes >= CHECKPOINT_BYTES {
            self.checkpoint(files, lower, upper, end)?;
        } else {
            self.data.set_copied_below(upper.number, end);
        }
        Ok(Step::Moved(moved_bytes))
    }

    /// Steps 2 and 3: everything of the upper layer below `end` is in the lower file from now on.
    fn checkpoint(
        &mut self,
        files: &StackFiles,
        lower: &LayerHandle,
        upper: &LayerHandle,
        end: u64,
    ) -> Result<(), StoreError> {
        self.save_lower(files, lower)?;
        self.unsaved_bytes = 0;
        recount(files);
        let cursor = MergeCursor { layer: upper.number, moved_below: end };
        cursor
            .write(&files.disk, &files.dir)
            .map_err(|error| failed(files, "writing the cursor of a merge", error))?;
        let from = self.data.set_moved_below(upper.number, end);
        if StackFiles::is_unshared(&upper.file).unwrap_or(false) {
            punch(files, upper, from..end)?;
        }
        Ok(())
    }

    /// Writes the lower file's changed tables and syncs it.
    fn save_lower(&self, files: &StackFiles, lower: &LayerHandle) -> Result<(), StoreError> {
        let pages = self.data.dirty_pages(lower.number);
        let write = || -> std::io::Result<()> {
            for (page, bytes) in &pages {
                lower.file.write_now(page.file_offset(), bytes)?;
            }
            lower.file.sync_now()
        };
        write().map_err(|error| failed(files, "writing a merged layer", error))?;
        self.data.tables_saved(lower.number, pages.iter().map(|(page, _)| *page));
        Ok(())
    }

    /// Step 4: the lower file stands for both.
    fn replace_pair(&mut self, files: &mut StackFiles, lower_index: usize) -> Result<(), StoreError> {
        let mut next = files.manifest.clone();
        let upper = next.layers.remove(lower_index + 1);
        let lower = &mut next.layers[lower_index];
        lower.snapshot = upper.snapshot;
        lower.size_bytes = upper.size_bytes;
        let lower_number = lower.number;
        files.replace(next)?;
        self.data.merged(lower_number, upper.number);
        files.remove_layer_file(upper.number);
        recount(files);
        Ok(())
    }

    /// Moves the top down at once while writes wait.
    fn move_top(
        &mut self,
        files: &mut StackFiles,
        lower: &LayerHandle,
        upper: &LayerHandle,
    ) -> Result<Step, StoreError> {
        let gate = self.data.close_gate();
        self.data.flush_and_wait()?;
        // Writes went on until the gate was closed.
        if self.count_until(files, upper, 2 * MOVED_AT_ONCE_BLOCKS)? > 2 * MOVED_AT_ONCE_BLOCKS {
            return Ok(Step::Moved(0));
        }
        let mut moved_bytes = 0;
        let mut from = 0;
        self.scanned = None;
        while let Some(first) = self.next_window(files, upper, from)? {
            let end = ((first / WINDOW_BLOCKS + 1) * WINDOW_BLOCKS).min(upper.blocks);
            moved_bytes += match self.copy(files, lower, upper, first, end) {
                Err(StoreError::NoSpace(_)) => return Ok(Step::Later),
                other => other?,
            };
            from = end;
        }
        self.lengthen(files, lower, upper)?;
        self.scanned = None;
        self.save_lower(files, lower)?;
        self.replace_top(files, &gate, lower, upper)?;
        drop(gate);
        files.remove_layer_file(upper.number);
        recount(files);
        Ok(Step::Moved(moved_bytes))
    }

    fn replace_top(
        &self,
        files: &mut StackFiles,
        gate: &Gate,
        lower: &LayerHandle,
        upper: &LayerHandle,
    ) -> Result<(), StoreError> {
        layer::lock(&lower.file, layer_path(&files.dir, lower.number), Duration::ZERO)
            .map_err(|error| files.store_error("locking a layer", &error))?;
        let mut next = files.manifest.clone();
        next.layers.pop();
        if let Some(top) = next.layers.last_mut() {
            top.frozen = false;
            top.size_bytes = next.size_bytes;
        }
        files.replace(next)?;
        gate.pop(lower.number, upper.number);
        Ok(())
    }

    /// Step 1 for the blocks `first..end`, which lie in one window. Tells how many bytes of data were copied.
    fn copy(
        &mut self,
        files: &StackFiles,
        lower: &LayerHandle,
        upper: &LayerHandle,
        first: u64,
        end: u64,
    ) -> Result<u64, StoreError> {
        self.lengthen(files, lower, upper)?;
        self.reserve_tables(files, lower, first)?;
        let entries = self.data.entries_now(upper.number, first..end)?;
        let own = self.data.entries_now(lower.number, first..end)?;
        let mut moved = Vec::new();
        let mut copied = 0;
        for run in runs(first, &entries, &own) {
            match run.kind {
                RunKind::Data { lacks_space } => {
                    if lacks_space {
                        reserve_data(files, lower, run.start, run.count)?;
                    }
                    self.copy_data(files, lower, upper, &run, &entries[run.at..], &mut moved)?;
                    copied += run.count * BLOCK_BYTES;
                }
                RunKind::NoData => {
                    let (offset, len) = (data_offset(run.start), run.count * BLOCK_BYTES);
                    if own[run.at..run.at + run.len()].iter().any(|entry| entry.state.has_space()) {
                        let punched = lower.file.punch_now(offset, len);
                        punched.map_err(|error| failed(files, "giving space back", error))?;
                    }
                    let here = &entries[run.at..run.at + run.len()];
                    moved.extend((run.start..).zip(here.iter().map(|entry| without_space(*entry))));
                }
            }
        }
        self.data.set_entries(lower.number, &moved)?;
        Ok(copied)
    }

    /// Copies a run of data. Checksums are seeded anew where the two layers were written by different volumes (R30); a
    /// block that does not verify goes on not verifying.
    fn copy_data(
        &self,
        files: &StackFiles,
        lower: &LayerHandle,
        upper: &LayerHandle,
        run: &Run,
        entries: &[Entry],
        moved: &mut Vec<(u64, Entry)>,
    ) -> Result<(), StoreError> {
        let len = usize::try_from(run.count * BLOCK_BYTES).expect("a window fits in memory");
        let data = upper
            .file
            .read_now(data_offset(run.start), len)
            .map_err(|error| unreadable(files, upper, "reading the data of", error))?;
        for ((block, entry), bytes) in (run.start..).zip(entries).zip(data.chunks(PAGE_BYTES)) {
            let good = upper.summer.sum(block, bytes) == entry.sum;
            let sum = lower.summer.sum(block, bytes);
            moved.push((block, Entry::data(if good { sum } else { other_sum(sum) })));
        }
        lower
            .file
            .write_now(data_offset(run.start), &data)
            .map_err(|error| failed(files, "writing a merged layer", error))
    }

    /// The lower file gets the upper one's size before it gets its blocks.
    fn lengthen(
        &self,
        files: &StackFiles,
        lower: &LayerHandle,
        upper: &LayerHandle,
    ) -> Result<(), StoreError> {
        let wanted = layer_file_bytes(upper.blocks * BLOCK_BYTES);
        let lengthen = || -> std::io::Result<()> {
            if lower.file.len_bytes()? < wanted { lower.file.set_len(wanted) } else { Ok(()) }
        };
        lengthen().map_err(|error| failed(files, "growing a layer", error))?;
        self.data.lengthened(lower.number, upper.blocks);
        Ok(())
    }

    fn reserve_tables(
        &mut self,
        files: &StackFiles,
        lower: &LayerHandle,
        block: u64,
    ) -> Result<(), StoreError> {
        let (group, size_bytes) = (group_of(block), files.manifest.size_bytes);
        let wanted = Some((lower.number, group, size_bytes));
        if self.reserved == wanted {
            return Ok(());
        }
        for (offset, len) in table_areas(size_bytes, group) {
            let reserved = lower.file.reserve_now(offset, len);
            reserved.map_err(|error| failed(files, "reserving space for tables", error))?;
        }
        self.reserved = wanted;
        Ok(())
    }

    fn handle(&self, number: u32) -> Result<LayerHandle, StoreError> {
        let replica = self.data.replica();
        let gone =
            || StoreError::File { replica, action: "merging", what: format!("layer {number} is gone") };
        self.data.layer_handle(number).ok_or_else(gone)
    }

    /// The first window from `from` on in which the layer has blocks, by its allocation map or its checksums: a block on
    /// which the two disagree is bad and must not be lost, or what lies below would come through.
    ///
    /// The layer's tables are on the disk as they are in memory: it is frozen, or flushed with the gate closed.
    fn next_window(
        &mut self,
        files: &StackFiles,
        layer: &LayerHandle,
        from: u64,
    ) -> Result<Option<u64>, StoreError> {
        let mut at = from;
        while at < layer.blocks {
            let group = group_of(at);
            let known = self.scanned.as_ref().is_some_and(|s| s.layer == layer.number && s.group == group);
            if !known {
                let windows = scan_group(layer, files.manifest.size_bytes, group)
                    .map_err(|error| unreadable(files, layer, "reading the tables of", error))?;
                self.scanned = Some(Scanned { layer: layer.number, group, windows });
            }
            let windows = self.scanned.iter().flat_map(|scanned| &scanned.windows);
            if let Some(window) = windows.copied().find(|window| window + WINDOW_BLOCKS > at) {
                return Ok(Some(window.max(from)));
            }
            at = (group + 1) * BLOCKS_PER_GROUP;
        }
        Ok(None)
    }

    /// Counts the blocks that the layer has; stops beyond `limit`.
    fn count_until(&self, files: &StackFiles, layer: &LayerHandle, limit: u64) -> Result<u64, StoreError> {
        let mut count = 0;
        for page in (0..layer.blocks.div_ceil(STATES_PER_PAGE)).map(TablePage::States) {
            count += count_allocated(&self.page(files, layer, page)?);
            if count > limit {
                break;
            }
        }
        Ok(count)
    }

    fn page(
        &self,
        files: &StackFiles,
        layer: &LayerHandle,
        page: TablePage,
    ) -> Result<AlignedBuf, StoreError> {
        let page = self.data.page_now(layer.number, &layer.file, page);
        page.map_err(|error| unreadable(files, layer, "reading the allocation map of", error))
    }
}

/// The windows of a group in which a layer has blocks.
fn scan_group(layer: &LayerHandle, size_bytes: u64, group: u64) -> std::io::Result<Vec<u64>> {
    let first = group * BLOCKS_PER_GROUP;
    let [states_area, sums_area] = table_areas(size_bytes.min(layer.blocks * BLOCK_BYTES), group);
    let in_use = |(offset, len): (u64, u64)| -> std::io::Result<bool> {
        Ok(layer.file.next_data(offset)?.is_some_and(|data| data < offset + len))
    };
    if !in_use(states_area)? && !in_use(sums_area)? {
        return Ok(Vec::new());
    }
    let read = |(offset, len): (u64, u64)| {
        layer.file.read_now(offset, usize::try_from(len).expect("a megabyte at most"))
    };
    let (states, sums) = (read(states_area)?, read(sums_area)?);
    let is_set = |bytes: &[u8]| bytes.iter().any(|byte| *byte != 0);
    let states_of_windows = states.chunks(usize::try_from(WINDOW_BLOCKS / 4).expect("256 bytes"));
    let windows = sums.chunks(PAGE_BYTES).zip(states_of_windows).zip((first..).step_by(PAGE_BYTES / 4));
    Ok(windows
        .filter(|((sums, states), _)| is_set(sums) || is_set(states))
        .map(|(_, window)| window)
        .collect())
}

/// A failed read changed nothing: no reason to poison the handle.
fn unreadable(
    files: &StackFiles,
    layer: &LayerHandle,
    action: &'static str,
    source: std::io::Error,
) -> StoreError {
    let path = layer_path(&files.dir, layer.number);
    files.store_error("reading a layer that is merged", &crate::PoolError::Io { action, path, source })
}

/// The lowest layer that has no snapshot and whose file nobody shares.
pub fn mergeable(files: &StackFiles) -> Result<Option<usize>, StoreError> {
    for (index, entry) in files.manifest.layers.iter().enumerate() {
        if !entry.frozen || entry.snapshot.is_some() {
            continue;
        }
        let Some(handle) = files.data.layer_handle(entry.number) else { continue };
        let unshared = StackFiles::is_unshared(&handle.file)
            .map_err(|error| unreadable(files, &handle, "examining", error))?;
        // One whose own blocks are being moved down is no place for others; its own merge comes first.
        if unshared && handle.moved_below == 0 {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

fn reserve_data(files: &StackFiles, lower: &LayerHandle, start: u64, count: u64) -> Result<(), StoreError> {
    let bytes = count * BLOCK_BYTES;
    if !files.data.pool().charge(bytes, Charge::Metadata) {
        return Err(StoreError::NoSpace(files.manifest.replica_id));
    }
    lower.file.reserve_now(data_offset(start), bytes).map_err(|error| {
        files.data.pool().give_back(bytes);
        failed(files, "reserving space for a merge", error)
    })
}

/// Gives the space of moved blocks back. What a crash leaves goes with the file.
fn punch(files: &StackFiles, upper: &LayerHandle, blocks: std::ops::Range<u64>) -> Result<(), StoreError> {
    let mut at = blocks.start;
    while at < blocks.end {
        let end = ((at / BLOCKS_PER_GROUP + 1) * BLOCKS_PER_GROUP).min(blocks.end);
        let punched = upper.file.punch_now(data_offset(at), (end - at) * BLOCK_BYTES);
        punched.map_err(|error| failed(files, "giving space back", error))?;
        at = end;
    }
    Ok(())
}

/// What the pool counts for a merge is made right by asking the file system.
fn recount(files: &StackFiles) {
    if let Err(error) = files.data.pool().recount() {
        tracing::warn!(replica = %files.manifest.replica_id, %error, "the pool's use cannot be counted");
    }
}

fn failed(files: &StackFiles, action: &'static str, error: std::io::Error) -> StoreError {
    files.failed_io(action, error, files.dir.clone())
}

/// An entry of a block without data, in a file that has no space for it.
fn without_space(entry: Entry) -> Entry {
    match entry.state {
        State::ZeroKept => Entry { state: State::Zero, ..entry },
        State::Absent | State::Zero | State::Data => entry,
    }
}

/// Blocks that are moved together.
struct Run {
    start: u64,
    count: u64,
    /// Index of the first one among the window's entries.
    at: usize,
    kind: RunKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RunKind {
    Data { lacks_space: bool },
    NoData,
}

impl Run {
    fn len(&self) -> usize {
        usize::try_from(self.count).expect("a window is small")
    }
}

/// Cuts a window's blocks that are not absent into runs.
fn runs(first: u64, entries: &[Entry], own: &[Entry]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (at, (entry, own)) in entries.iter().zip(own).enumerate() {
        if entry.is_absent() {
            continue;
        }
        let kind = match entry.state {
            State::Data => RunKind::Data { lacks_space: !own.state.has_space() },
            State::Absent | State::Zero | State::ZeroKept => RunKind::NoData,
        };
        let block = first + at as u64;
        match runs.last_mut() {
            Some(last) if last.kind == kind && last.start + last.count == block => last.count += 1,
            _ => runs.push(Run { start: block, count: 1, at, kind }),
        }
    }
    runs
}
