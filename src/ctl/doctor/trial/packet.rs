//! TCP segments without options or data (RFC 9293), and the IP headers around them (RFC 791, RFC 8200).

use std::net::{IpAddr, SocketAddr};

/// Opens a connection.
pub(super) const SYN: u8 = 0x02;
/// Ends one at once.
pub(super) const RST: u8 = 0x04;
/// The acknowledgement counts.
pub(super) const ACK: u8 = 0x10;

/// IP protocol number of TCP.
const TCP: u8 = 6;
const TCP_LEN: usize = 20;
/// Hops that a packet may go: it goes one.
const TTL: u8 = 64;

/// A segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
}

impl Segment {
    /// The TCP header with its checksum.
    pub fn tcp(&self) -> [u8; TCP_LEN] {
        let mut bytes = [0; TCP_LEN];
        bytes[0..2].copy_from_slice(&self.from.port().to_be_bytes());
        bytes[2..4].copy_from_slice(&self.to.port().to_be_bytes());
        bytes[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.acknowledged.to_be_bytes());
        bytes[12] = 5 << 4;
        bytes[13] = self.flags;
        bytes[14..16].copy_from_slice(&u16::MAX.to_be_bytes());
        // The pseudo header of both families sums to the same as addresses, protocol and length one after the other.
        let mut sum = Sum::default();
        sum.add(&octets(self.from.ip()));
        sum.add(&octets(self.to.ip()));
        sum.add(&[0, TCP, 0, TCP_LEN as u8]);
        sum.add(&bytes);
        bytes[16..18].copy_from_slice(&sum.finish().to_be_bytes());
        bytes
    }

    /// The whole packet.
    pub fn packet(&self) -> Vec<u8> {
        let (from, to) = (octets(self.from.ip()), octets(self.to.ip()));
        let mut bytes = match self.from.ip() {
            IpAddr::V4(_) => {
                let mut head = vec![0x45, 0, 0, 20 + TCP_LEN as u8, 0, 0, 0x40, 0, TTL, TCP, 0, 0];
                head.extend(from.iter().chain(&to));
                let mut sum = Sum::default();
                sum.add(&head);
                head[10..12].copy_from_slice(&sum.finish().to_be_bytes());
                head
            }
            IpAddr::V6(_) => {
                let mut head = vec![0x60, 0, 0, 0, 0, TCP_LEN as u8, TCP, TTL];
                head.extend(from.iter().chain(&to));
                head
            }
        };
        bytes.extend(self.tcp());
        bytes
    }

    /// Of a whole packet; `None` when it is no TCP, or cut short.
    pub fn of_packet(packet: &[u8]) -> Option<Self> {
        let address = |at: usize, len: usize| -> Option<IpAddr> {
            let octets = packet.get(at..at + len)?;
            if len == 4 {
                Some(IpAddr::from(<[u8; 4]>::try_from(octets).ok()?))
            } else {
                Some(IpAddr::from(<[u8; 16]>::try_from(octets).ok()?))
            }
        };
        match packet.first()? >> 4 {
            4 if packet.get(9) == Some(&TCP) => {
                let head = usize::from(packet[0] & 0x0f) * 4;
                Self::of_tcp(address(12, 4)?, address(16, 4)?, packet.get(head..)?)
            }
            6 if packet.get(6) == Some(&TCP) => Self::of_tcp(address(8, 16)?, address(24, 16)?, packet.get(40..)?),
            _ => None,
        }
    }

    /// Of what follows the IP header.
    pub fn of_tcp(from: IpAddr, to: IpAddr, tcp: &[u8]) -> Option<Self> {
        let two = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let four = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            from: SocketAddr::new(from, two(0)?),
            to: SocketAddr::new(to, two(2)?),
            sequence: four(4)?,
            acknowledged: four(8)?,
            flags: *tcp.get(13)?,
        })
    }
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// The Internet checksum (RFC 1071) over pieces of even length.
#[derive(Default)]
struct Sum(u32);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for pair in bytes.chunks(2) {
            self.0 += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
        }
    }
    fn finish(self) -> u16 {
        let once = (self.0 & 0xffff) + (self.0 >> 16);
        !((once + (once >> 16)) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(from: &str, to: &str) -> Segment {
        let addr = |text: &str| text.parse().expect("address");
        Segment { from: addr(from), to: addr(to), sequence: 1, acknowledged: 2, flags: SYN }
    }

    /// Over what is right the Internet checksum is zero.
    fn sum_of(pieces: &[&[u8]]) -> u16 {
        let mut sum = Sum::default();
        pieces.iter().for_each(|piece| sum.add(piece));
        sum.finish()
    }

    #[test]
    fn a_packet_is_read_as_it_was_written_and_its_checksums_hold() {
        for (from, to) in [("192.0.2.1:50000", "198.51.100.7:8080"), ("[2001:db8::1]:50000", "[2001:db8::2]:8080")] {
            let segment = segment(from, to);
            let packet = segment.packet();
            assert_eq!(Segment::of_packet(&packet), Some(segment));
            let head = packet.len() - TCP_LEN;
            let (from, to) = (octets(segment.from.ip()), octets(segment.to.ip()));
            assert_eq!(sum_of(&[&from, &to, &[0, TCP, 0, TCP_LEN as u8], &packet[head..]]), 0);
            if segment.from.is_ipv4() {
                assert_eq!(sum_of(&[&packet[..head]]), 0);
            }
            for len in 0..packet.len() - 6 {
                assert_eq!(Segment::of_packet(&packet[..len]), None, "cut at {len}");
            }
        }
        assert_eq!(Segment::of_packet(&[0x45; 60]), None, "not TCP");
    }
}
