//! What is in the kernel now: names, counters, drift. Read through nft's JSON and the `nftables` crate, object by
//! object, so that what one of them does not know is passed over and not an error.

use std::collections::BTreeMap;

use nftables::schema::{NfListObject, NfObject};

use super::cgroups;
use super::nft::{self, NftError};
use super::render::Present;
use crate::config::InstanceName;
use crate::instance::Paths;

/// Whether the inet table is there.
pub fn table_exists(table: &str) -> Result<bool, NftError> {
    Ok(nft::inet_tables()?.iter().any(|t| t == table))
}

/// Chains and sets of a table; nothing when it does not exist.
pub fn present(table: &str) -> Result<Present, NftError> {
    let mut out = Present::default();
    for value in objects(table)? {
        // By name alone: the crate does not parse every set that nft lists (set type `uid`).
        let name = |kind: &str| value.get(kind)?.get("name")?.as_str().map(str::to_owned);
        out.chains.extend(name("chain"));
        out.sets.extend(name("set"));
    }
    Ok(out)
}

/// Named counters of a table: packets by name.
pub fn counters(table: &str) -> Result<BTreeMap<String, u64>, NftError> {
    let mut out = BTreeMap::new();
    for value in objects(table)? {
        if let Ok(NfObject::ListObject(NfListObject::Counter(counter))) = serde_json::from_value(value) {
            out.insert(counter.name.into_owned(), counter.packets.unwrap_or(0) as u64);
        }
    }
    Ok(out)
}

/// How the capture table in the kernel differs from what was applied, in words; `None` when it does not. That a cgroup
/// of it is gone is no difference.
pub fn drift(paths: &Paths, instance: &InstanceName, table: &str) -> Result<Option<String>, NftError> {
    let Ok(applied) = std::fs::read_to_string(paths.applied(instance)) else {
        return Ok(None);
    };
    match nft::list_stateless(table) {
        Ok(now) if cgroups::same_listing(&applied, &now) => Ok(None),
        Ok(_) => Ok(Some(format!("table inet {table} was changed"))),
        Err(e) if e.is_absent() => Ok(Some(format!("table inet {table} is gone"))),
        Err(e) => Err(e),
    }
}

fn objects(table: &str) -> Result<Vec<serde_json::Value>, NftError> {
    let text = match nft::list_json(table) {
        Ok(text) => text,
        Err(e) if e.is_absent() => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut listing: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| NftError::Refused(format!("nft printed JSON that is none: {e}")))?;
    match listing.get_mut("nftables").map(serde_json::Value::take) {
        Some(serde_json::Value::Array(objects)) => Ok(objects),
        _ => Ok(Vec::new()),
    }
}
