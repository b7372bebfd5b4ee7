//! Where collateral comes from: files that the operator keeps, then a PCCS, whose answers are kept until they end.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use dcap_qvl::config::PckCa;

use super::collateral::Collateral;
use super::fetch::Fetcher;
use super::{BuiltinError, pccs};
use crate::os::clock;
use crate::os::clock::Clock;
use crate::os::lock::Lock;

/// Platform families kept.
const MAX_KEPT: usize = 64;
/// Collateral that was fetched this long ago is fetched again in the background: what Intel revokes shows in a day.
const REFRESH_AFTER: u64 = 24 * 3600;
/// No new attempt for so long after one that failed while what is kept still holds.
const RETRY_AFTER: u64 = 600;

/// Which collateral a quote needs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// `tdx` or `sgx`.
    pub tee: &'static str,
    /// Family, model, stepping and platform, hexadecimal in capitals.
    pub fmspc: String,
    /// Who issued the platform's certificate.
    pub ca: PckCa,
}

struct File {
    path: PathBuf,
    modified: Option<SystemTime>,
    collateral: Arc<Collateral>,
}

#[derive(Clone)]
struct Kept {
    collateral: Arc<Collateral>,
    /// When it is to be fetched again, seconds since the epoch.
    again: u64,
}

/// Dates of the collateral at hand, from files and fetched; seconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct CollateralStatus {
    /// For how many platform families there is some.
    pub families: usize,
    /// Issue of the oldest.
    pub issued: u64,
    /// The first end.
    pub ends: u64,
}

/// Collateral by platform.
pub struct Store {
    files: Mutex<Vec<File>>,
    pccs: Option<Arc<Fetcher>>,
    kept: Arc<Mutex<HashMap<Platform, Kept>>>,
    /// One fetch at a time: a thousand peers of one family need one.
    fetching: Arc<tokio::sync::Mutex<()>>,
}

fn read(path: &PathBuf) -> Result<File, String> {
    let at = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let modified = std::fs::metadata(path).and_then(|m| m.modified()).ok();
    let text = std::fs::read(path).map_err(|e| at(&e))?;
    let collateral = Arc::new(Collateral::from_json(&text).map_err(|e| at(&e))?);
    Ok(File { path: path.clone(), modified, collateral })
}

impl Store {
    /// Reads the files.
    pub fn new(files: &[PathBuf], pccs: Option<Fetcher>) -> Result<Self, String> {
        Ok(Self {
            files: Mutex::new(files.iter().map(read).collect::<Result<_, _>>()?),
            pccs: pccs.map(Arc::new),
            kept: Arc::default(),
            fetching: Arc::default(),
        })
    }

    /// Requests to the PCCS.
    pub fn calls(&self) -> u64 {
        self.pccs.as_ref().map_or(0, |p| p.calls())
    }

    /// What is at hand, if anything is.
    pub fn status(&self) -> Option<CollateralStatus> {
        let files = self.files.locked();
        let kept = self.kept.locked();
        let dates = files.iter().map(|f| &f.collateral).chain(kept.values().map(|k| &k.collateral));
        let one = |c: &Arc<Collateral>| CollateralStatus { families: 1, issued: c.from, ends: c.until };
        dates.map(one).reduce(|a, b| CollateralStatus {
            families: a.families + b.families,
            issued: a.issued.min(b.issued),
            ends: a.ends.min(b.ends),
        })
    }

    /// Collateral for `platform` that is valid now.
    pub async fn get(&self, platform: &Platform, clock: &Arc<dyn Clock>) -> Result<Arc<Collateral>, BuiltinError> {
        let now = clock::unix(clock.now());
        let file = self.in_files(platform);
        if let Some(collateral) = &file
            && (collateral.valid_at(now).is_ok() || self.pccs.is_none())
        {
            return collateral.valid_at(now).map(|()| collateral.clone());
        }
        let Some(pccs) = &self.pccs else {
            return Err(BuiltinError::NoCollateral { tee: platform.tee, fmspc: platform.fmspc.clone() });
        };
        if let Some(kept) = self.kept(platform)
            && kept.collateral.valid_at(now).is_ok()
        {
            if now >= kept.again {
                self.refresh(platform, now);
            }
            return Ok(kept.collateral);
        }
        let _turn = self.fetching.lock().await;
        // Who waited for the turn finds what the one before fetched.
        if let Some(kept) = self.kept(platform)
            && kept.collateral.valid_at(now).is_ok()
        {
            return Ok(kept.collateral);
        }
        let collateral = Arc::new(pccs::fetch(pccs, platform).await?);
        collateral.valid_at(now)?;
        keep(&self.kept, platform, collateral.clone(), now);
        Ok(collateral)
    }

    fn kept(&self, platform: &Platform) -> Option<Kept> {
        self.kept.locked().get(platform).cloned()
    }

    /// A file that was replaced is read again; one that cannot be read any more keeps its last content.
    fn in_files(&self, platform: &Platform) -> Option<Arc<Collateral>> {
        let mut files = self.files.locked();
        for file in files.iter_mut() {
            let modified = std::fs::metadata(&file.path).and_then(|m| m.modified()).ok();
            if modified.is_some() && modified != file.modified {
                match read(&file.path) {
                    Ok(new) => *file = new,
                    Err(error) => {
                        tracing::warn!(%error, "replaced collateral cannot be read; the former is kept");
                        file.modified = modified;
                    }
                }
            }
        }
        let fits = |c: &&Arc<Collateral>| c.fmspc == platform.fmspc && c.id.eq_ignore_ascii_case(platform.tee);
        files.iter().map(|f| &f.collateral).filter(fits).max_by_key(|c| c.until).cloned()
    }

    /// Fetches in the background what will be needed when the kept one ends.
    fn refresh(&self, platform: &Platform, now: u64) {
        let (Some(pccs), Ok(turn)) = (self.pccs.clone(), self.fetching.clone().try_lock_owned()) else { return };
        let (platform, kept) = (platform.clone(), self.kept.clone());
        tokio::spawn(async move {
            let _turn = turn;
            match pccs::fetch(&pccs, &platform).await {
                Ok(new) if new.valid_at(now).is_ok() => keep(&kept, &platform, Arc::new(new), now),
                outcome => {
                    let error = outcome.err().map(|e| e.to_string()).unwrap_or_else(|| "not valid now".into());
                    tracing::warn!(%error, "no new collateral; the former is used until it ends");
                    if let Some(kept) = kept.locked().get_mut(&platform) {
                        kept.again = now + RETRY_AFTER;
                    }
                }
            }
        });
    }
}

fn keep(kept: &Mutex<HashMap<Platform, Kept>>, platform: &Platform, collateral: Arc<Collateral>, now: u64) {
    let mut kept = kept.locked();
    if kept.len() >= MAX_KEPT && !kept.contains_key(platform) {
        // The family whose collateral ends first.
        let first = kept.iter().min_by_key(|(_, k)| k.collateral.until).map(|(p, _)| p.clone());
        first.and_then(|p| kept.remove(&p));
    }
    // Ahead of its end also when that is near.
    let again = (now + REFRESH_AFTER).min(now + (collateral.until - now) / 2);
    kept.insert(platform.clone(), Kept { collateral, again });
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
