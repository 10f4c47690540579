//! The storage half's decisions, without I/O: input and `now` in, actions out.
//!
//! Two state machines carry the replication protocol (`docs/protocol.md` names the rules R1 to R36):
//!
//! - [`target::Target`]: one start of the process that serves an attached volume. It takes the generation, opens the
//!   replicas, orders overlapping I/O, fans writes out, acknowledges, swaps failed replicas out and brings them back.
//! - [`replica::Replica`]: one full copy. It fences old targets, grants leases, keeps the intent log and dirty maps.
//!
//! ```text
//!  client ── requests ──> engine ── TargetEvent ──> Target ── TargetAction ──> engine ── NBD, gRPC ──> engine
//!                                                                                                        │
//!                                         disk <── DiskOp ── Replica <── ReplicaEvent ───────────────────┘
//! ```
//!
//! Neither sees a payload byte, a clock, a socket, a file or a random number: time comes in as `now_ms` (monotonic,
//! `CLOCK_BOOTTIME`), random ids and seeds come in as inputs. So the same code runs in the seeded simulation.
//!
//! [`group::Group`] is a third one, beside them: it cuts snapshots of several volumes at one instant (R29).
//!
//! [`encryption`] makes an encrypted volume's key and cipher.
//!
//! [`rescue`] finds out what can be restored of a record store that is lost.
//!
//! [`transitions`] holds every change of a volume's record as a pure function, [`placement`] the choice of nodes.

pub mod background;
pub mod block_range;
pub mod dirty_map;
pub mod encryption;
pub mod group;
#[doc(hidden)]
pub mod guards;
pub mod ids;
pub mod io_limits;
pub mod node_directory;
pub mod placement;
pub mod rebalance;
pub mod record;
pub mod record_copy;
pub mod record_store;
pub mod replica;
pub mod rescue;
pub mod target;
pub mod timers;
pub mod token_bucket;
pub mod transitions;
