//! Removing our tables for good.

use super::load::present;
use super::program::MSG_DELTABLE;
use super::skeleton::Table;
use super::socket::NetfilterSocket;
use crate::error::Result;

/// Removes those of our two tables that exist, in one transaction; gives their names as `nft` has them.
pub(crate) fn remove_tables(socket: &mut NetfilterSocket, table: &str) -> Result<Vec<String>> {
    let found = present(socket, table)?;
    let mut batch = socket.batch();
    for t in &found {
        batch.push(MSG_DELTABLE, 0, t.family(), format!("delete {t:?} table {table}"), |out| {
            out.string(1, table);
        });
    }
    socket.commit(batch)?;
    let family = |t: &Table| match t {
        Table::Inet => "inet",
        Table::Bridge => "bridge",
    };
    Ok(found.iter().map(|t| format!("{} {table}", family(t))).collect())
}
