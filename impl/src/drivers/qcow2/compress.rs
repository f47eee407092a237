//! Reading compressed clusters: raw deflate, bounded in input and output.
//!
//! Rules: the stream starts inside the file and takes at most two clusters; success is exactly one cluster of
//! output (what follows in the input is ignored). Writing is in `packed`.

use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};

use super::image::Qcow2;
use super::l2::Entry;
use super::units::us;
use crate::driver::Cx;
use crate::error::Errno;

impl Qcow2 {
    /// Reads part of a compressed cluster, from byte `within` of it on.
    pub(super) async fn read_compressed(
        &self,
        cx: &Cx,
        entry: Entry,
        within: u64,
        out: &mut [u8],
    ) -> Result<(), Errno> {
        let range = us(within)..us(within) + out.len();
        if let Some((_, content)) = self
            .inflated
            .borrow()
            .as_ref()
            .filter(|(cached, _)| *cached == entry.0)
        {
            out.copy_from_slice(&content[range]);
            return Ok(());
        }
        let (at, bytes) = entry.compressed(self.geometry.cluster_bits);
        let cs = self.geometry.cs();
        if bytes > 2 * cs || at.0 >= self.host_length(cx) {
            let text = format!("Compressed cluster at {:#x} with {bytes} bytes is invalid", at.0);
            return Err(self.found_corrupt(cx, &text, Some(at.0), Some(bytes)));
        }
        let mut input = vec![0; us(bytes)];
        self.host_read(cx, at, &mut input).await?;
        let mut content = self.blank_table();
        inflate(&input, &mut content)?;
        out.copy_from_slice(&content[range]);
        *self.inflated.borrow_mut() = Some((entry.0, content));
        Ok(())
    }
}

/// Inflates a raw deflate stream to exactly `out`.
fn inflate(input: &[u8], out: &mut [u8]) -> Result<(), Errno> {
    let mut state = Box::<DecompressorOxide>::default();
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, written) = decompress(&mut state, input, out, 0, flags);
    if written == out.len() {
        Ok(())
    } else {
        Err(Errno::EIO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_cluster_counts() {
        let content: Vec<u8> = (0..4096u32)
            .map(|i| u8::try_from(i / 16 % 251).unwrap())
            .collect();
        let mut packed = miniz_oxide::deflate::compress_to_vec(&content, 6);
        let mut out = vec![0; 4096];
        packed.extend_from_slice(&[0xff; 100]);
        assert_eq!(inflate(&packed, &mut out), Ok(()), "trailing bytes are ignored");
        assert_eq!(out, content);
        assert_eq!(inflate(&packed[..20], &mut out), Err(Errno::EIO), "cut short");
        let mut longer = vec![0; 8192];
        assert_eq!(
            inflate(&packed, &mut longer),
            Err(Errno::EIO),
            "too little output"
        );
        let mut shorter = vec![0; 100];
        assert_eq!(
            inflate(&packed, &mut shorter),
            Ok(()),
            "a stream that goes on is cut"
        );
        assert_eq!(shorter, content[..100]);
        assert_eq!(inflate(&[0xff; 64], &mut out), Err(Errno::EIO), "garbage");
    }
}
