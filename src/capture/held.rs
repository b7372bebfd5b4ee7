//! Who holds a table: the kernel's own answer, without nft (linux/netfilter/nf_tables.h, NFT_MSG_GETTABLE).

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8;
const NFT_MSG_GETTABLE: u16 = NFNL_SUBSYS_NFTABLES << 8 | 1;
const NFPROTO_INET: u8 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_OWNER: u16 = 7;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// nlmsghdr, then nfgenmsg.
const HEADER: usize = 16;
const BODY: usize = HEADER + 4;

/// Whose an inet table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// There is no such table.
    Absent,
    /// Anybody's: it has no `flags owner`.
    Nobody,
    /// The netlink socket with this port id.
    Port(u32),
}

/// Asks the kernel.
pub(super) fn holder(table: &str) -> io::Result<Holder> {
    let socket = Socket::new(NETLINK_NETFILTER)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&question(table), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    parse(&answer).unwrap_or_else(|| Err(io::Error::other("the kernel's answer about a table cannot be read")))
}

fn question(table: &str) -> Vec<u8> {
    let name_len = 4 + table.len() + 1;
    let len = BODY + name_len.next_multiple_of(4);
    let mut out = Vec::with_capacity(len);
    out.extend((len as u32).to_ne_bytes());
    out.extend(NFT_MSG_GETTABLE.to_ne_bytes());
    out.extend(NLM_F_REQUEST.to_ne_bytes());
    out.extend([0; 8]);
    out.extend([NFPROTO_INET, 0, 0, 0]);
    out.extend((name_len as u16).to_ne_bytes());
    out.extend(NFTA_TABLE_NAME.to_ne_bytes());
    out.extend(table.as_bytes());
    out.resize(len, 0);
    out
}

/// `None`: not in the form that the headers give.
fn parse(message: &[u8]) -> Option<io::Result<Holder>> {
    match u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?) {
        NLMSG_ERROR => {
            let error = i32::from_ne_bytes(message.get(HEADER..HEADER + 4)?.try_into().ok()?);
            Some(match error.checked_neg()? {
                libc::ENOENT => Ok(Holder::Absent),
                errno => Err(io::Error::from_raw_os_error(errno)),
            })
        }
        NFT_MSG_NEWTABLE => {
            let mut attributes = message.get(BODY..)?;
            while attributes.len() >= 4 {
                let len = usize::from(u16::from_ne_bytes(attributes[..2].try_into().ok()?));
                let kind = u16::from_ne_bytes(attributes[2..4].try_into().ok()?);
                let value = attributes.get(4..len)?;
                if kind == NFTA_TABLE_OWNER {
                    return Some(Ok(Holder::Port(u32::from_be_bytes(value.try_into().ok()?))));
                }
                attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
            }
            Some(Ok(Holder::Nobody))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, rest: &[u8]) -> Vec<u8> {
        let mut out = vec![0; 4];
        out.extend(kind.to_ne_bytes());
        out.extend([0; 10]);
        out.extend(rest);
        out
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut out = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    #[test]
    fn answers_of_the_kernel_are_told_apart() {
        let gone = answer(NLMSG_ERROR, &(-libc::ENOENT).to_ne_bytes());
        assert_eq!(parse(&gone).unwrap().unwrap(), Holder::Absent);
        let denied = answer(NLMSG_ERROR, &(-libc::EPERM).to_ne_bytes());
        assert_eq!(parse(&denied).unwrap().unwrap_err().raw_os_error(), Some(libc::EPERM));
        let name = attribute(NFTA_TABLE_NAME, b"tngguard_x\0");
        let free = answer(NFT_MSG_NEWTABLE, &[vec![1, 0, 0, 0], name.clone()].concat());
        assert_eq!(parse(&free).unwrap().unwrap(), Holder::Nobody);
        let owner = attribute(NFTA_TABLE_OWNER, &0x8000_1234_u32.to_be_bytes());
        let owned = answer(NFT_MSG_NEWTABLE, &[vec![1, 0, 0, 0], name, owner].concat());
        assert_eq!(parse(&owned).unwrap().unwrap(), Holder::Port(0x8000_1234));
        for len in 0..owned.len() {
            let _ = parse(&owned[..len]);
        }
        assert!(parse(&answer(3, &[])).is_none());
        assert!(parse(&answer(NLMSG_ERROR, &i32::MIN.to_ne_bytes())).is_none());
        assert!(parse(&answer(NFT_MSG_NEWTABLE, &[1, 0, 0, 0, 0, 0, 7, 0])).is_none(), "an attribute without length");
    }

    #[test]
    fn a_question_is_padded_to_whole_words() {
        for name in ["a", "abc", "abcd"] {
            let text = question(name);
            assert_eq!(text.len() % 4, 0);
            assert_eq!(u32::from_ne_bytes(text[..4].try_into().unwrap()) as usize, text.len());
        }
    }
}
