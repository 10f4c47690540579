//! NetworkPolicy v1 and ClusterNetworkPolicy v1alpha2: objects in, ruleset out, and the same model answers "explain".
//!
//! ```text
//! Objects + local endpoints --Model::compile--> Model { ruleset } --> dataplane
//!                                                   \--------------> explain
//! ```
//!
//! A class is the set of policies that select a local pod in one direction (with the numbers behind the port names they
//! use); an identity is the set of peer selectors and IP blocks, of the policies in force on this node, that match an
//! address. Both are named by content, so that unrelated changes never renumber them ([`Numbering`]).

mod explain;
mod lookup;
mod model;
mod numbering;
mod ranges;
mod reference;
mod rules;
mod tiers;
mod validate;
mod validate_cluster;

pub use explain::{Decision, DirectionAnswer, Explanation, Party, explain};
pub use lookup::{Direction, allows};
pub use model::{Model, Subject};
pub use numbering::{Floor, Numbering};
pub use reference::{PolicyRef, Tier};
pub use validate::{InvalidPolicy, validate};
pub use validate_cluster::validate_cluster;
