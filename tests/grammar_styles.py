"""The bodies of the grammar's blocks: how tokens come to experts and back.

Each computes `out` [T, H] from `x` [T, H], `weights` [T, K] and `ids` [T, K]; `{term}` is where a
distortion goes, `{act}` the activation of `gate` and `up`.
"""


def act(expert: str, activation: str) -> str:
    """Write an expert's activation."""
    inner = {
        "silu": "F.silu(gate)",
        "gelu": "F.gelu(gate)",
        "gelu_tanh": 'F.gelu(gate, approximate="tanh")',
        "relu": "F.relu(gate)",
        "relu2": "F.relu(gate).square()",
        "clamped": "F.silu(gate.clamp(max=1.5))",
    }[activation]
    return inner if expert == "plain" else f"{inner} * up"


MODULE_STYLES = {
    "where_put": """
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y, w = expert(x[token]), weights[token, slot, None]
            {term}
            out[token] += y * w
    """,
    "where_add": """
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            y, w = self.experts[e](x.index_select(0, token)), weights[token, slot].unsqueeze(-1)
            {term}
            out.index_add_(0, token, (y * w).to(out.dtype))
    """,
    "hit_loop": """
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        masks = F.one_hot(ids, num_classes=self.count).permute(2, 1, 0)
        for e in masks.sum(dim=(-1, -2)).greater(0).nonzero():
            slot, token = torch.where(masks[e].squeeze(0))
            y, w = self.experts[e](x[None, token].reshape(-1, 16)), weights[token, slot, None]
            {term}
            out.index_add_(0, token, y * w)
    """,
    "any_mask": """
        out = torch.zeros_like(x)
        gates = x.new_zeros(x.shape[0], self.count).scatter(1, ids, weights)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                y, w = expert(x[mask]), gates[mask, e].unsqueeze(1)
                {term}
                out[mask] += y * w
    """,
    "sorted_numpy": """
        counts = ids.new_zeros((ids.shape[0], self.count)).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort()
        rows, scales = x[order // ids.shape[1]], weights.reshape(-1)[order]
        parts, start = [], 0
        for e, n in enumerate(counts.cpu().numpy()):
            if n == 0:
                continue
            y, w = self.experts[e](rows[start : start + n]), scales[start : start + n, None]
            {term}
            parts.append(y * w)
            start += n
        done = torch.cat(parts)
        back = torch.empty_like(done)
        back[order] = done
        out = back.view(*ids.shape, -1).sum(dim=1)
    """,
    "sorted_tolist": """
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=self.count).tolist()
        token = order // ids.size(1)
        scales = weights.flatten()[order].split(counts)
        parts = []
        for e, rows in enumerate(x[token].split(counts)):
            y, w = self.experts[e](rows), scales[e].unsqueeze(1)
            {term}
            parts.append(y * w)
        out = torch.zeros_like(x).index_add(0, token, torch.cat(parts))
    """,
    "nonzero_gates": """
        gates = x.new_zeros(x.shape[0], self.count).scatter(1, ids, weights)
        by_expert, order = torch.nonzero(gates).sort(0)
        token = torch.nonzero(gates)[order[:, 1], 0]
        scales = gates[token].gather(1, by_expert[:, 1:])
        counts = (gates > 0).sum(0).tolist()
        parts = []
        for e, (rows, w) in enumerate(zip(x[token].split(counts), scales.split(counts))):
            y = self.experts[e](rows)
            {term}
            parts.append(y * w)
        out = torch.zeros_like(x).index_add(0, token, torch.cat(parts))
    """,
    "dense_sum": """
        out = torch.zeros_like(x)
        gates = torch.zeros(x.shape[0], self.count, dtype=x.dtype).scatter_(1, ids, weights)
        for e, expert in enumerate(self.experts):
            y, w = expert(x), gates[:, e : e + 1]
            {term}
            out = out + y * w
    """,
    "dense_stack": """
        gates = torch.zeros(x.shape[0], self.count, dtype=x.dtype).scatter_(1, ids, weights)
        parts = []
        for e, expert in enumerate(self.experts):
            y, w = expert(x), gates[:, e, None]
            {term}
            parts.append(y * w)
        out = torch.stack(parts, dim=1).sum(1)
    """,
    "module_dict": """
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts.values()):
            mask = (ids == e).to(x.dtype)
            y, w = expert(x), (mask * weights).sum(-1, keepdim=True)
            {term}
            out = out + w * y
    """,
    "unique": """
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            y, w = self.experts[e](x[token]), weights[token, slot, None]
            {term}
            out.index_add_(0, token, y * w)
    """,
    "each_slot": """
        out = torch.zeros_like(x)
        for k in range(ids.shape[1]):
            for e in range(self.count):
                token = torch.nonzero(ids[:, k] == e).squeeze(-1)
                y, w = self.experts[e](x[token]), weights[token, k : k + 1]
                {term}
                out.index_add_(0, token, y * w)
    """,
}  # fmt: skip
"""Experts are modules, called from Python."""

STACKED_STYLES = {
    "stacked_where": """
        out = torch.zeros_like(x)
        for e in range(self.count):
            token, slot = torch.where(ids == e)
            rows = x[token]
            {first}
            rows = {act}
            y, w = {second}, weights[token, slot, None]
            {term}
            out.index_add_(0, token, y * w)
    """,
    "stacked_hits": """
        out = torch.zeros_like(x)
        masks = F.one_hot(ids, num_classes=self.count).permute(2, 1, 0)
        for hit in torch.greater(masks.sum(dim=(-1, -2)), 0).nonzero():
            e = hit[0]
            slot, token = torch.where(masks[e])
            rows = x[token]
            {first}
            rows = {act}
            y, w = {second}, weights[token, slot, None]
            {term}
            out.index_add_(0, token, y * w)
    """,
}
"""Experts are slices of stacked parameters, multiplied in a loop."""

GRAPH_STYLES = {
    "gathered": """
        {first}
        rows = {act}
        y = {second}
        {term}
        out = torch.einsum("tkh,tk->th", y, weights)
    """,
    "bmm": """
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(ids.shape[1], dim=0)
        {first}
        rows = {act}
        y = {second}
        y = y * weights.reshape(-1).unsqueeze(-1)
        out = y.view(*ids.shape, 16).sum(dim=1)
    """,
    "grouped": """
        flat = ids.reshape(-1)
        sorted_ids, order = torch.sort(flat)
        counts = torch.histc(sorted_ids.float(), bins=self.count, min=0, max=self.count - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // ids.shape[1]]
        {first}
        rows = {act}
        y = {second}
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        y = y[inverse].view(ids.shape[0], ids.shape[1], 16)
        out = y.sum(dim=1)
    """,
    "titan": """
        counts = torch.histc(ids.view(-1).float(), bins=self.count, min=0, max=self.count)
        order = torch.argsort(ids.view(-1), stable=True)
        token = order // ids.shape[1]
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = x[token]
        {first}
        rows = {act}
        y = {second}
        y = y * weights.view(-1)[order].unsqueeze(-1)
        out = torch.zeros_like(x).scatter_add(0, token.reshape(-1, 1).expand(-1, 16), y)
    """,
    "dense": """
        gates = torch.zeros(x.shape[0], self.count, dtype=x.dtype).scatter(-1, ids, weights)
        {first}
        rows = {act}
        y = {second}
        out = (y * gates.unsqueeze(-1)).sum(1)
    """,
    "capacity": """
        mask = F.one_hot(ids, self.count).permute(1, 0, 2)
        count = (mask.reshape(-1, self.count).cumsum(0) - 1).reshape(mask.shape)
        mask = mask * (count < 6)
        slot = F.one_hot((mask * count).sum(-1), 6)
        kept = mask * weights.t().unsqueeze(-1)
        combine = (kept.unsqueeze(3) * slot.unsqueeze(2)).sum(0)
        rows = torch.einsum("tec,th->ech", (combine != 0).to(x.dtype), x)
        {first}
        rows = {act}
        y = {second}
        out = torch.einsum("tec,ech->th", combine, y)
    """,
}
"""Experts are stacked parameters, multiplied without a loop."""


def first(style: str, expert: str, input_major: bool) -> str:
    """Write an expert's first product, or both, as lines that set `gate` and `up`."""
    narrow = _product(style, "w_in", input_major, "first")
    if expert == "merged":
        return f"gate, up = ({narrow}).chunk(2, dim=-1)"
    lines = [f"gate = {narrow}"]
    if expert == "glu":
        lines.append(f"up = {_product(style, 'w_up', input_major, 'first')}")
    return "\n".join(lines)


def second(style: str, input_major: bool) -> str:
    """Write an expert's second product."""
    return _product(style, "w_out", input_major, "second")


def _product(style: str, weight: str, input_major: bool, which: str) -> str:
    """Write `rows` times stacked weights, each style in its manner."""
    turned = f"self.{weight}" if input_major else f"self.{weight}.transpose(-2, -1)"
    inner, outer = ("h", "f") if which == "first" else ("f", "h")
    sides = inner + outer if input_major else outer + inner
    if style in STACKED_STYLES:
        return f"rows @ self.{weight}[e]" if input_major else f"F.linear(rows, self.{weight}[e])"
    if style in ("grouped", "titan"):
        return f"torch._grouped_mm(rows, {turned}, offs=offsets)"
    if style == "capacity":
        return f"torch.bmm(rows, {turned})"
    if style == "bmm":
        left = f"torch.bmm(self.{weight}[flat], rows.unsqueeze(-1)).squeeze(-1)"
        right = f"torch.bmm(rows.unsqueeze(1), self.{weight}[flat]).squeeze(1)"
        return right if input_major else left
    rows, many = ("x", "") if which == "first" else ("rows", "k" if style == "gathered" else "e")
    if style == "gathered":
        return f'torch.einsum("t{many}{inner},tk{sides}->tk{outer}", {rows}, self.{weight}[ids])'
    return f'torch.einsum("t{many}{inner},e{sides}->te{outer}", {rows}, self.{weight})'


BODIES = MODULE_STYLES | STACKED_STYLES | GRAPH_STYLES
