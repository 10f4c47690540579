//! The simulation notices when a rule is taken out: each guard, switched off, is found within a bounded number of seeds.

use holdfast_storage_core::guards::Guards;

use crate::run;
