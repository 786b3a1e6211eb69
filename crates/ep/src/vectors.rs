//! Which vector instructions a kernel uses.

/// The instructions that a [`Quantiser`](crate::Quantiser) or a [`Summer`](crate::Summer) uses. The results do not
/// depend on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// None: one value at a time. For tests, and for processors without any of the others.
    Scalar,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512, the foundation and the byte and word instructions, on top of [`Vectors::Avx2`].
    Avx512,
    /// NEON, on 64-bit Arm.
    Neon,
}

impl Vectors {
    /// Every one, the best last on each architecture.
    pub const ALL: [Vectors; 4] = [Vectors::Scalar, Vectors::Avx2, Vectors::Avx512, Vectors::Neon];

    /// The best of those that this processor has.
    pub(crate) fn detect() -> Vectors {
        Vectors::ALL.into_iter().rfind(|vectors| vectors.supported()).unwrap_or(Vectors::Scalar)
    }

    #[cfg(target_arch = "x86_64")]
    pub(crate) fn supported(self) -> bool {
        let avx2 = || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = || is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        match self {
            Vectors::Scalar => true,
            Vectors::Avx2 => avx2(),
            Vectors::Avx512 => avx2() && avx512(),
            Vectors::Neon => false,
        }
    }

    #[cfg(target_arch = "aarch64")]
    pub(crate) fn supported(self) -> bool {
        match self {
            Vectors::Scalar => true,
            Vectors::Avx2 | Vectors::Avx512 => false,
            Vectors::Neon => std::arch::is_aarch64_feature_detected!("neon"),
        }
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn supported(self) -> bool {
        self == Vectors::Scalar
    }
}
