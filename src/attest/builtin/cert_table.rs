//! The certificate table that a host gives with a SEV-SNP report (GHCB specification, section 4.1.8.1;
//! `auxblob` of the kernel's report interface).

use super::BuiltinError;

/// Entries read.
const MAX_ENTRIES: usize = 32;
/// Length of an entry: GUID, offset, length.
const ENTRY: usize = 24;
/// ASK (or ASVK), VCEK, VLEK: certificates below the root. The root is never taken from a peer.
const WANTED: [u128; 3] = [
    0x4ab7b379_bbac_4fe4_a02f_05aef327c782,
    0x63da758d_e664_4564_adc5_f4b93be8accd,
    0xa8074bc2_a25a_483e_aae6_39c045a0b8a1,
];

/// What the bytes of a GUID stand for. Hosts write it in the order of the text or in the mixed order of RFC 4122's
/// variant 2.
pub(in crate::attest) fn guids(bytes: [u8; 16]) -> [u128; 2] {
    let mut mixed = bytes;
    mixed[..4].reverse();
    mixed[4..6].reverse();
    mixed[6..8].reverse();
    [u128::from_be_bytes(bytes), u128::from_be_bytes(mixed)]
}

/// The certificates of a table, DER, as far as they can belong to a VCEK's chain. An empty blob has none.
pub fn certificates(blob: &[u8]) -> Result<Vec<Vec<u8>>, BuiltinError> {
    let mut found = Vec::new();
    for n in 0..MAX_ENTRIES {
        let Some(entry) = blob.get(n * ENTRY..(n + 1) * ENTRY) else {
            // Some hosts give no closing entry when there is nothing at all.
            return if blob.is_empty() {
                Ok(found)
            } else {
                Err(BuiltinError::Report("a certificate table without end"))
            };
        };
        let (guid, place) = entry.split_at(16);
        let guid: [u8; 16] = guid.try_into().expect("16 of 24 bytes");
        if guid == [0; 16] {
            return Ok(found);
        }
        let number = |at: usize| {
            let bytes: [u8; 4] = place[at..at + 4].try_into().expect("4 of 8 bytes");
            usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (start, len) = (number(0), number(4));
        let der = start.checked_add(len).and_then(|end| blob.get(start..end));
        let der = der.ok_or(BuiltinError::Report("a certificate beyond the end of its table"))?;
        if guids(guid).iter().any(|guid| WANTED.contains(guid)) {
            found.push(der.to_vec());
        }
    }
    Err(BuiltinError::Report("too many certificates"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(entries: &[(u128, &[u8])]) -> Vec<u8> {
        let (mut head, mut body) = (Vec::new(), Vec::new());
        let start = (entries.len() + 1) * ENTRY;
        for (guid, der) in entries {
            head.extend(guid.to_be_bytes());
            head.extend(u32::try_from(start + body.len()).unwrap().to_le_bytes());
            head.extend(u32::try_from(der.len()).unwrap().to_le_bytes());
            body.extend_from_slice(der);
        }
        head.extend([0; ENTRY]);
        head.extend(body);
        head
    }

    #[test]
    fn certificates_of_the_chain_are_taken_and_others_left() {
        let ark = 0xc0b406a4_a803_4952_9743_3fb6014cd0ae;
        let blob = table(&[(WANTED[1], b"vcek"), (ark, b"ark"), (WANTED[0], b"ask")]);
        assert_eq!(certificates(&blob), Ok(vec![b"vcek".to_vec(), b"ask".to_vec()]));
        // The mixed order of the first three parts.
        let blob = table(&[(0x8d75da63_64e6_6445_adc5_f4b93be8accd, b"vcek")]);
        assert_eq!(certificates(&blob), Ok(vec![b"vcek".to_vec()]));
        assert_eq!(certificates(&[]), Ok(vec![]));
        assert_eq!(certificates(&[0; ENTRY]), Ok(vec![]));
    }

    #[test]
    fn a_table_that_points_outside_of_itself_is_refused() {
        let mut blob = table(&[(WANTED[1], b"vcek")]);
        blob.pop();
        assert!(certificates(&blob).is_err());
        let mut blob = table(&[(WANTED[1], b"vcek")]);
        blob[16..24].fill(0xff);
        assert!(certificates(&blob).is_err());
        assert!(certificates(&blob[..ENTRY]).is_err());
        assert!(certificates(&[1; 3000]).is_err());
        let many: Vec<(u128, &[u8])> = vec![(WANTED[1], b"x".as_slice()); MAX_ENTRIES];
        assert!(certificates(&table(&many)).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]

        #[test]
        fn no_table_panics(blob in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = certificates(&blob);
        }

        #[test]
        fn no_entry_panics(start in 0u32..90, len in 0u32..90, huge in any::<bool>()) {
            let mut blob = table(&[(WANTED[1], b"vcek")]);
            blob[16..20].copy_from_slice(&start.to_le_bytes());
            blob[20..24].copy_from_slice(&(if huge { u32::MAX - len } else { len }).to_le_bytes());
            if let Ok(found) = certificates(&blob) {
                prop_assert!(found.iter().all(|c| c.len() <= blob.len()));
            }
        }
    }
}
