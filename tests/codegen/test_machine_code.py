"""The loop that runs most, in disassembled kernels."""

from moecc.codegen import machine_code


def listing(*lines: str) -> str:
    """Write as nvdisasm does; what ends in a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * number:04x}*/ {line} ;"
        for number, line in enumerate(lines)
    )


def test_a_step_is_counted_without_what_ends_a_tile() -> None:
    code = machine_code.parse(
        listing(
            ".L_step:",
            *("IADD3 R1, R1, 0x1, RZ", "@!P0 BRA `(.L_product)"),
            *("MOV R2, R3", "STG.E [R2], R4", "MOV R5, RZ"),
            ".L_product:",
            *("HGMMA.64x256x16.F32 R24, R4", "@P1 BRA `(.L_step)", "EXIT"),
        )
    )
    assert code.hot_loop() == {"IADD3": 1, "BRA": 2, "HGMMA": 1}


def test_products_that_one_thread_asks_for_are_counted() -> None:
    """The branch around them is shorter, and no way through the loop for all warps."""
    code = machine_code.parse(
        listing(
            ".L_step:",
            *("BRA.U UP0, `(.L_elected)", "BRA `(.L_joined)"),
            ".L_elected:",
            *("UTCHMMA gdesc[UR4], tmem[UR5]", "UTCHMMA gdesc[UR6], tmem[UR5]"),
            ".L_joined:",
            *("SYNCS.ARRIVE [UR7]", "@P1 BRA `(.L_step)", "EXIT"),
        )
    )
    assert code.hot_loop() == {"BRA": 2, "UTCHMMA": 2, "SYNCS": 1}


def test_without_products_it_is_the_longest_loop_that_holds_no_other() -> None:
    code = machine_code.parse(
        listing(
            *(".L_outer:", "IADD3 R1, R1, 0x1, RZ"),
            *(".L_short:", "@P0 BRA `(.L_short)"),
            *(".L_long:", "LDG.E.128 R4, [R2]", "FFMA R5, R4, R4, R5", "@P1 BRA `(.L_long)"),
            *("@P2 BRA `(.L_outer)", "EXIT"),
        )
    )
    assert code.hot_loop() == {"LDG": 1, "LDG.128": 1, "FFMA": 1, "BRA": 1}
