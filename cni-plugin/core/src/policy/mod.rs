//! NetworkPolicy v1 and ClusterNetworkPolicy v1alpha2: objects in, ruleset out, and the same model answers "explain".
//!
//! ```text
//! ObjectChange, endpoints --Compiler--> Delta --> dataplane
//!                              \-------> explain
//! ```
//!
//! A class is the set of policies that select a local pod in one direction (with the numbers behind the port names they
//! use); an identity is the set of peer selectors and IP blocks, of the policies in force on this node, that match an
//! address. A pair of them has a profile: the ports that all tiers together allow.

mod compare;
mod compiler;
mod explain;
mod limits;
mod lookup;
mod ranges;
mod reference;
mod rules;
mod tiers;
mod validate;
mod validate_cluster;

pub use compare::{Difference, differences};
pub use compiler::{Compiler, Counts, PolicyStanding, Subject};
pub use explain::{Decision, DirectionAnswer, Explanation, Party};
pub use limits::{PARTS_MAX, PIECES_MAX, PORTS_MAX, check_cluster_size, check_size, closed, closed_cluster};
pub use lookup::{Direction, Elements, Lookup, PairStep, PortLookup, Trace, allows};
pub use reference::{PolicyRef, Tier};
pub use validate::{InvalidPolicy, validate};
pub use validate_cluster::validate_cluster;
