//! A table that a stranger cannot touch: `flags owner`, held by a netlink socket.
//!
//! The kernel ties an owned table to the netlink socket that made it. Others' `flush ruleset` passes it by and their
//! `delete table` gets EPERM; it vanishes when the last descriptor of that socket closes. The socket is that of an
//! `nft -i`, and a copy of it, here and with the service manager, keeps the table when nft or this process is killed.
//!
//! A table can be changed only through its own socket, so without that nft there has to be a new table by a new one.
//! The name is taken until the old socket closes; meanwhile a stand-in of another name refuses the same. It goes in the
//! transaction that loads the new table, so there is no moment without: `tests/guard` looks at the ruleset and with
//! connections all the while.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::fdstore::{FdStore, Kept, Record};
use super::held::{Holder, holder};
use super::ir::Table;
use super::nft::{self, NftError};
use super::nft_process::NftProcess;
use super::render::{self, Present};
use super::{apply, observe};

/// How long the old table may take to go: the service manager closes its copy when it has read our note.
const LET_GO: Duration = Duration::from_secs(5);
/// Time between two looks at it.
const LOOK: Duration = Duration::from_millis(1);

/// An owned table.
pub(super) struct TableOwner {
    table: String,
    file: PathBuf,
    store: FdStore,
    /// `None` until a table that was taken over has to change.
    nft: Option<NftProcess>,
    /// Copy of the socket. `None` when it could not be had: then the table goes with nft.
    kept: Option<Kept>,
    /// Of a socket that is let go when the table is loaded by another.
    retiring: Option<Kept>,
    /// The stand-in is loaded.
    stand_in: bool,
}

impl TableOwner {
    /// Holds `wanted`: the one that a socket among `inherited` owns already, if it is the same, else a new one.
    pub(super) fn hold(
        wanted: &Table,
        file: &Path,
        store: FdStore,
        inherited: Vec<Kept>,
    ) -> Result<(Self, Origin), NftError> {
        let mut owner = Self {
            table: wanted.name.clone(),
            file: file.to_owned(),
            store,
            nft: None,
            kept: None,
            retiring: None,
            stand_in: false,
        };
        owner.inherit(inherited)?;
        if owner.holds_already(wanted)? {
            return Ok((owner, Origin::Adopted));
        }
        owner.load(wanted)?;
        Ok((owner, Origin::Loaded))
    }

    /// Keeps the socket that owns the table, or else the one that owns the stand-in, and closes the others.
    fn inherit(&mut self, inherited: Vec<Kept>) -> Result<(), NftError> {
        let (table, stand_in) = (holder(&self.table)?, holder(&stand_in_name(&self.table))?);
        for kept in inherited {
            let owns = |what: Holder| what == Holder::Port(kept.port());
            if owns(table) || (owns(stand_in) && self.kept.is_none()) {
                if let Some(other) = self.kept.replace(kept) {
                    self.store.forget(other);
                }
            } else {
                self.store.forget(kept);
            }
        }
        // A stand-in whose owner was closed just now would be in the way of the next one.
        if self.kept.as_ref().is_some_and(|k| table == Holder::Port(k.port())) {
            wait_absent(&stand_in_name(&self.table))?;
        }
        Ok(())
    }

    fn holds_already(&self, wanted: &Table) -> Result<bool, NftError> {
        let Some(kept) = self.kept.as_ref() else { return Ok(false) };
        let Some(record) = kept.read() else { return Ok(false) };
        Ok(holder(&self.table)? == Holder::Port(kept.port())
            && record.wanted == render::table(wanted)
            && record.listing == listing(&self.table)?)
    }

    /// Changes the table to `wanted`, in one transaction.
    pub(super) fn load(&mut self, wanted: &Table) -> Result<(), NftError> {
        if !self.nft.as_mut().is_some_and(NftProcess::is_alive) {
            self.renew(wanted)?;
        }
        let Some(nft) = self.nft.as_mut() else { return Err(NftError::Refused("nft -i ended".into())) };
        let mut text = render::transaction(wanted, &observe::present(&self.table)?);
        if self.stand_in {
            text.push_str(&format!("delete table inet {}\n", stand_in_name(&self.table)));
        }
        nft.load(&text, &self.table)?;
        self.stand_in = false;
        if self.kept.is_none() {
            self.keep_socket();
        }
        self.close_retiring();
        self.record(wanted);
        Ok(())
    }

    /// A new nft, and the name of the table free for it.
    fn renew(&mut self, wanted: &Table) -> Result<(), NftError> {
        let mut nft = NftProcess::start(&self.file)?;
        let next = stand_in_name(&self.table);
        let bridge = holder(&self.table)? != Holder::Absent && holder(&next)? == Holder::Absent;
        if bridge {
            let stand_in = Table { name: next.clone(), ..wanted.clone() };
            nft.load(&render::transaction(&stand_in, &Present::default()), &next)?;
        }
        self.nft = Some(nft);
        self.close_retiring();
        self.retiring = self.kept.take();
        self.stand_in = bridge;
        if bridge {
            self.keep_socket();
            let _ = apply::point("guard.stand-in");
            self.close_retiring();
        }
        wait_absent(&self.table)?;
        let _ = apply::point("guard.let-go");
        Ok(())
    }

    fn keep_socket(&mut self) {
        let socket = self.nft.as_ref().and_then(NftProcess::socket);
        match socket.map(|socket| Kept::new(socket, self.retiring.as_ref())) {
            Some(Ok(kept)) => {
                self.store.keep(&kept);
                self.kept = Some(kept);
            }
            Some(Err(error)) => tracing::warn!(reason = "guard-not-kept", %error, "the table would go with nft"),
            None => tracing::warn!(
                reason = "guard-not-kept",
                "the table would go with nft: its socket cannot be copied (pidfd_getfd; kernel.yama.ptrace_scope?)"
            ),
        }
    }

    fn close_retiring(&mut self) {
        if let Some(old) = self.retiring.take() {
            self.store.forget(old);
        }
    }

    /// What is loaded, for the guard that comes after this one.
    fn record(&self, wanted: &Table) {
        let (FdStore::Systemd, Some(kept)) = (self.store, self.kept.as_ref()) else { return };
        let recorded = listing(&self.table)
            .map(|listing| Record { wanted: render::table(wanted), listing })
            .and_then(|record| Ok(kept.write(&record)?));
        if let Err(error) = recorded {
            tracing::warn!(reason = error.reason(), %error, "the next guard will load its table anew");
        }
    }

    /// What is wrong with the holding of the table, if anything is.
    pub(super) fn fault(&mut self) -> Result<Option<Fault>, NftError> {
        if self.nft.as_mut().is_some_and(|nft| !nft.is_alive()) {
            return Ok(Some(Fault::NftEnded));
        }
        let ours = self.kept.as_ref().map(|k| Holder::Port(k.port()));
        let sound = match (holder(&self.table)?, ours) {
            (now, Some(ours)) => now == ours,
            (now, None) => now != Holder::Absent,
        };
        Ok((!sound).then_some(Fault::TableLost))
    }

    /// Removes the table at once, and from the service manager.
    pub(super) fn remove(mut self) -> Result<(), NftError> {
        self.close_retiring();
        if let Some(kept) = self.kept.take() {
            self.store.forget(kept);
        }
        self.nft = None;
        wait_absent(&self.table)
    }
}

/// How a table came to be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// It was there, and stayed untouched.
    Adopted,
    /// It was loaded.
    Loaded,
}

/// What can be wrong with a held table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The table stays by the copy of the socket, but cannot be changed.
    NftEnded,
    /// The kernel has it no more, or has another's.
    TableLost,
}

/// As nft lists it, without the name of the program that owns it: that one is gone when the next guard looks.
fn listing(table: &str) -> Result<String, NftError> {
    let text = nft::list_stateless(table)?;
    let head = text.find('\n').unwrap_or(text.len());
    let program = text[..head].find(" # progname").unwrap_or(head);
    Ok(format!("{}{}", &text[..program], &text[head..]))
}

/// No instance name has an underscore, so this is no other instance's table.
fn stand_in_name(table: &str) -> String {
    format!("{table}_next")
}

/// The last copy of a socket may be with a process that is just ending, or with the service manager.
fn wait_absent(table: &str) -> Result<(), NftError> {
    let end = Instant::now() + LET_GO;
    while holder(table)? != Holder::Absent {
        if Instant::now() >= end {
            let text = format!("table inet {table} belongs to another process: is another guard of it running?");
            return Err(NftError::Refused(text));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}
